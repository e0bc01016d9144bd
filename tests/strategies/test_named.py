"""Strategies by name, and by name with values."""

from __future__ import annotations

import re

import pytest

import gtp_fx
from gtp_fx.strategies import Auto, Regeneration, strategy_named
from gtp_fx.strategies.registry import as_written

from support.captured import optimised
from support.zoo import BY_NAME


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("tome", gtp_fx.ToMe()),
        ("tome()", gtp_fx.ToMe()),
        ("regeneration(windows=skip)", Regeneration(windows="skip")),
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
        ("gtp(alhpa=0.2)", "gtp has no alhpa; did you mean 'alpha'? It has score, graph, neighbors, alpha"),
        ("gtp(alpha=much)", "give a finite number"),
        ("regeneration(windows=sleep)", "'skip', 'rest'"),
        ("gpt(alpha=0.2)", "is unknown; give one of 'auto', 'gtp'"),
        ("tomee", "; did you mean 'tome'?"),
    ],
)
def test_what_is_wrong_is_said(text: str, message: str) -> None:
    with pytest.raises(gtp_fx.OptionError, match=re.escape(message)):
        strategy_named(text)


def test_a_strategy_is_written_as_it_is_read() -> None:
    every = [
        *Auto().contenders(),
        gtp_fx.GTP(alpha=0.2, score="cls-mean", token_scale=True),
        Regeneration(windows="skip"),
    ]
    assert all(strategy_named(as_written(strategy)) == strategy for strategy in every)
    assert as_written(gtp_fx.ToMe()) == "tome" and as_written(every[-1]) == "regeneration(windows=skip)"


def test_a_schedule_is_for_its_strategy() -> None:
    """Its counts are for any, and "auto" values are compared as they are settled for them."""
    row = BY_NAME["deit"]
    planned = optimised(row, flops_budget=0.7, strategy="gtp")
    counts = planned.schedule
    assert counts.strategy.startswith("gtp(token_scale=")
    for strategy in ("gtp", planned.strategy):
        assert optimised(row, schedule=counts, strategy=strategy).schedule == counts
    for other in ("tome", "gtp(alpha=0.2)"):
        told = f"for strategy {counts.strategy!r}, and the strategy here is {other!r}.*only the counts, schedule=\\["
        with pytest.raises(gtp_fx.ScheduleError, match=told.replace("(", r"\(").replace(")", r"\)")):
            optimised(row, schedule=counts, strategy=other)
    assert optimised(row, schedule=list(counts), strategy="tome").schedule.strategy == "tome"
