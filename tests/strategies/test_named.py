"""Strategies by name, and by name with values."""

from __future__ import annotations

import pytest

import gtp_fx
from gtp_fx.strategies import Regeneration, strategy_named


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("tome", gtp_fx.ToMe()),
        ("tome()", gtp_fx.ToMe()),
        ("regeneration(windows=rest)", Regeneration(windows="rest")),
        ("gtp(alpha=0.2, graph='spatial', token_scale=True)", gtp_fx.GTP(alpha=0.2, graph="spatial", token_scale=True)),
    ],
)
def test_values_are_read(text: str, wanted: object) -> None:
    assert strategy_named(text) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gtp(0.2)", "can't be read"),
        ("gtp(", "can't be read"),
        ("gtp(alpha=__import__('os'))", "can't be read"),
        ("gtp(alpha=0.2)(alpha=0.3)", "can't be read"),
        ("gtp(**{})", "can't be read"),
        ("gtp(alhpa=0.2)", "gtp has no alhpa; it has score, graph, neighbors, alpha"),
        ("gtp(alpha=much)", "give a finite number"),
        ("regeneration(windows=sleep)", "'skip', 'rest'"),
        ("gpt(alpha=0.2)", "is unknown; give one of 'auto', 'gtp'"),
    ],
)
def test_what_is_wrong_is_said(text: str, message: str) -> None:
    with pytest.raises(gtp_fx.OptionError, match=message.replace("(", r"\(")):
        strategy_named(text)
