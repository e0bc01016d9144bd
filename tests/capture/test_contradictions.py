"""Open sizes that belong together by what only Dynamo knows are found before a pass runs on them."""

from __future__ import annotations

import torch
from torch import fx, nn

from gtp_fx.graph.primes import contradiction
from gtp_fx.graph.torch_internals import fake_mode

aten = torch.ops.aten


def _viewed(size: int) -> fx.GraphModule:
    """Return a graph that views [2B, 3] as [size, 6]."""
    graph, mode = fx.Graph(), fake_mode()
    x = graph.placeholder("x")
    view = graph.call_function(aten.reshape.default, (x, [-1, 6]))
    graph.output(view)
    with mode:
        x.meta["val"], view.meta["val"] = torch.empty(2 * 4026961, 3), torch.empty(size, 6)
    return fx.GraphModule(nn.Module(), graph)


def test_a_view_that_fits_is_none() -> None:
    assert contradiction(_viewed(4026961).graph) is None


def test_a_view_by_another_symbol_is_one() -> None:
    found = contradiction(_viewed(4062241).graph)
    assert found is not None and found.target is aten.reshape.default
