"""What sections pass on: streams whose features lie together in memory, and no views that differ with their readers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gtp_fx.graph.torch_internals import hint
from gtp_fx.model.sections.alike import kinds
from gtp_fx.model.sections.cut import cut
from gtp_fx.model.sections.memory_order import in_order
from gtp_fx.model.sections.values import lies_in_order, value_of

from support.plain_vit import built

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

WIDTH, SIDE = 6, 4


class FromConvolution(nn.Module):
    """Blocks on a stream that begins as a convolution's output, turned to features last; the second reads rows."""

    def __init__(self, own_positions: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 2, 2)
        self.positions = nn.Parameter(torch.randn(1, SIDE, SIDE, WIDTH)) if own_positions else None
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).permute(0, 2, 3, 1)
        if self.positions is not None:
            x = x + self.positions
        for i, layer in enumerate(self.layers):
            x = x + layer(F.layer_norm(x, (WIDTH,)))
            if i == 0:
                x = x.reshape(x.shape[0], SIDE * SIDE, WIDTH)
        return x.mean(1)


def graph_of(model: nn.Module, x: Tensor, dynamic: bool) -> tuple[fx.GraphModule, list[Any]]:
    """Return a model's graph as a backend gets it, with its values, and its inputs."""
    found: list[tuple[fx.GraphModule, list[Any]]] = []

    def noted(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        found.append((gm, inputs))
        return gm

    # In operators, as sections get a graph that is optimised.
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},) if dynamic else None)
    torch.compile(exported.module(), backend=noted, dynamic=dynamic)(x)
    return found[-1]


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("own_positions", [True, False], ids=["positions", "no positions"])
def test_a_convolutions_stream_is_copied_once_before_its_first_sum(own_positions: bool, dynamic: bool) -> None:
    model = built(lambda: FromConvolution(own_positions))
    x = torch.randn(2, 3, 2 * SIDE, 2 * SIDE, generator=torch.Generator().manual_seed(1))
    gm, inputs = graph_of(model, x, dynamic)

    def sums() -> list[bool]:
        adds = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
        return [lies_in_order(value_of(node)) for node in adds]

    assert not all(sums()), "else there is nothing to mend"
    given = [hint(value) if isinstance(value, torch.SymInt) else value for value in inputs]
    expected = gm(*given)
    in_order(gm, inputs)
    assert all(sums())
    copies = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.contiguous.default)
    assert len(copies) == 1
    gm.recompile()
    # Norms and means add the same numbers in another order of memory.
    torch.testing.assert_close(gm(*given), expected, rtol=1e-5, atol=1e-6)
    in_order(gm, inputs)
    assert len(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.contiguous.default)) == 1


def test_views_before_a_cut_are_sections_that_are_not_compiled() -> None:
    """Two sums of which one is read as rows are of one kind."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 4, 4, 3)

    def call(target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
        return node

    aten = torch.ops.aten
    for rows in (False, False, True, False):
        if rows:
            x = call(aten.reshape.default, x, [2, 16, 3])
        x = call(aten.add.Tensor, x, call(aten.gelu.default, call(aten.layer_norm.default, x, [3])))
    graph.output((x,))
    parts = cut(graph)
    views = [part for part in parts if [node.target for node in part] == [aten.reshape.default]]
    assert len(views) == 1
    found = kinds(parts)
    assert [kind.as_it_is for kind in found if kind.sections[0].nodes[0] in views[0]] == [True]


@pytest.mark.parametrize(
    ("tensor", "answer"),
    [
        (torch.empty(2, 3, 4), True),
        (torch.empty(2, 4, 3).transpose(1, 2), False),
        (torch.empty(1, 3, 4).expand(2, 3, 4), False),
        (torch.empty(2, 1, 4).transpose(0, 1), True),  # strides of sizes of 1 mean nothing
    ],
)
def test_what_lies_in_order_is_what_torch_calls_contiguous(tensor: Tensor, answer: bool) -> None:
    assert lies_in_order(tensor) == tensor.is_contiguous() == answer
