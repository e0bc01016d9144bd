"""The garbage collector is as it was after a graph was made, or wasn't."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

import gtp_fx
from gtp_fx.model import graphs

from support.plain_vit import PlainViT, built, images


@pytest.fixture(params=[True, False])
def collecting(request: pytest.FixtureRequest) -> Iterator[bool]:
    (gc.enable if request.param else gc.disable)()
    yield request.param
    gc.enable()


def test_it_is_off_while_a_graph_is_made_and_as_before_then(collecting: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, made_for = [], graphs.made_for
    monkeypatch.setattr(graphs, "made_for", lambda *given: seen.append(gc.isenabled()) or made_for(*given))
    model = built(lambda: PlainViT(depth=1))
    gtp_fx.optimize(model, flops_budget=1.0, example_inputs=images(), compile=False)
    assert seen == [False] and gc.isenabled() is collecting
    with pytest.raises(gtp_fx.GtpError):
        gtp_fx.optimize(model, flops_budget=0.01, example_inputs=images(), compile=False)
    assert gc.isenabled() is collecting
