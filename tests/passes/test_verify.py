"""Shapes that the verifier works out by itself are the operators' own; what can't run is still found."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gtp_fx.graph.verify import InconsistentGraph, propagate_shapes

aten = torch.ops.aten


def _graph(target, *args) -> tuple[fx.GraphModule, fx.Node]:
    """Return a graph of one call, whose tensors are inputs with fake values."""
    graph, mode = fx.Graph(), FakeTensorMode()

    def as_input(value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return value
        node = graph.placeholder(f"x_{len(graph.nodes)}")
        node.meta["val"] = mode.from_tensor(value)
        return node

    call = graph.call_function(target, tuple(map(as_input, args)))
    graph.output(call)
    return fx.GraphModule(nn.Module(), graph), call


x = torch.randn(2, 5, 6)
W, b = torch.randn(4, 6), torch.randn(4)


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.linear.default, (x, W, b)),
        (aten.linear.default, (x, W)),
        (aten.linear.default, (x[0, 0], W, b)),
        (aten.linear.default, (x, W[0])),  # a vector for a weight takes the last dimension away
        (aten.linear.default, (x.half(), W.half(), b.half())),
        (aten.linear.default, (x.transpose(0, 1), W, b)),
        (aten.layer_norm.default, (x, [6], W[0], W[1])),
        (aten.layer_norm.default, (x, [5, 6])),
        (aten.layer_norm.default, (x.transpose(0, 1), [6])),
    ],
)
def test_shapes_are_the_operators_own(target, args):
    graph_module, call = _graph(target, *args)
    propagate_shapes(graph_module, after="here")
    wanted, found = target(*args), call.meta["val"]
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    if all(value.is_contiguous() for value in args[:1]):
        assert found.stride() == wanted.stride()


@pytest.mark.parametrize(("target", "args"), [(aten.linear.default, (x, W.T)), (aten.layer_norm.default, (x, [5]))])
def test_sizes_that_do_not_fit_are_found(target, args):
    graph_module, _ = _graph(target, *args)
    with pytest.raises(InconsistentGraph, match="after here"):
        propagate_shapes(graph_module, after="here")


def test_autocast_decides_of_dtypes():
    graph_module, call = _graph(aten.linear.default, x, W, b)
    with torch.autocast("cpu", torch.bfloat16):
        propagate_shapes(graph_module, after="here")
    assert call.meta["val"].dtype == torch.bfloat16
