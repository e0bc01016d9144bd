"""Shapes that a pass brings up to date: calls that are alike are run once, and others each by itself."""

from typing import Any

import pytest
import torch
from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph.torch_internals import fake_mode, is_fake
from gtp_fx.graph.verify import InconsistentGraph, propagate_shapes


def _graph_of(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[fx.GraphModule, list[fx.Node]]:
    """Return a graph module that returns its inputs, of these shapes, and these inputs."""
    graph = fx.Graph()
    inputs = [graph.placeholder(f"x{number}") for number in range(len(shapes))]
    with fake_mode():
        for node, shape in zip(inputs, shapes, strict=True):
            node.meta["val"] = torch.empty(shape, dtype=dtype)
    graph.output(tuple(inputs))
    return fx.GraphModule({}, graph), inputs


def _called(gm: fx.GraphModule, target: Any, *args: Any) -> fx.Node:
    with gm.graph.inserting_before(gm.graph.output_node()):
        return gm.graph.call_function(target, args)


def test_numbers_that_are_equal_and_of_other_types_are_other_calls() -> None:
    gm, (x,) = _graph_of((2, 3), dtype=torch.int64)
    values = [_called(gm, aten.mul.Tensor, x, by) for by in (2, 2.0, 2)]
    truths = [_called(gm, aten.add.Tensor, x, by) for by in (1, True, 1.0)]
    propagate_shapes(gm, after="test")
    assert [node.meta["val"].dtype for node in values] == [torch.int64, torch.float32, torch.int64]
    assert [node.meta["val"].dtype for node in truths] == [torch.int64, torch.int64, torch.float32]


def test_calls_that_are_alike_have_values_of_their_own_and_of_one_form() -> None:
    gm, (x, y) = _graph_of((4, 6), (4, 6))
    chunks = [_called(gm, aten.split.Tensor, of, 2, 1) for of in (x, y)]
    turned = [_called(gm, aten.t.default, of) for of in (x, y)]
    wide = _called(gm, aten.t.default, turned[1])
    propagate_shapes(gm, after="test")
    (one, other), (of_x, of_y) = ([node.meta["val"] for node in nodes] for nodes in (turned, chunks))
    assert one is not other and is_fake(other) and other.stride() == one.stride() == (1, 6)
    assert wide.meta["val"].shape == (4, 6) and wide.meta["val"].is_contiguous()
    assert type(of_x) is type(of_y) and [tuple(part.shape) for part in of_y] == [(4, 2)] * 3


def test_a_call_that_cannot_run_is_found_beside_one_that_can() -> None:
    gm, (x, y, z) = _graph_of((2, 3), (3, 4), (5, 4))
    _called(gm, aten.mm.default, x, y)
    _called(gm, aten.mm.default, x, y)
    wrong = _called(gm, aten.mm.default, x, z)
    with pytest.raises(InconsistentGraph, match=rf"after cut: aten.mm.default \({wrong.name}\)"):
        propagate_shapes(gm, after="cut")
