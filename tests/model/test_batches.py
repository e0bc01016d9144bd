"""Batches that are sums: two batches in one, a template beside the call's images, views of each; and their parting.

Each is exact at budget 1.0 on two batch sizes, and within 0.74 of the FLOPs by torch's own count on both.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.ops import aten
from torch.utils import _pytree as pytree

import gtp_fx
from bench.counted import flops
from bench.dynamo_door import Door
from gtp_fx.graph.edit import call, set_args
from gtp_fx.graph.primes import fix_symbols
from gtp_fx.graph.symbols import at_batch, divided, is_symbolic, shape_of, written

from support.batches import PATCH, SIDE, WIDTH, Block, Joined, models
from support.captured import captured, optimised, shared_model

BUDGET = 0.74
BATCHES = ((3, 4), (5, 2))
EVERY_DAY = [
    Joined("two batches", "pixels", "slice"),
    Joined("template", "blocks", "pooled"),
    Joined("mirror", "tokens", "decoder"),
    Joined("views", "pixels", "reshape"),
]


def apart(found: Any, wanted: Any) -> float:
    """The largest difference, of the largest value."""
    pairs = list(zip(pytree.tree_leaves(found), pytree.tree_leaves(wanted), strict=True))
    assert [a.shape for a, _ in pairs] == [b.shape for _, b in pairs]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            kind,
            id=f"{kind.joined} {kind.place} {kind.parted}",
            marks=[] if kind in EVERY_DAY else [pytest.mark.nightly],
        )
        for number, kind in enumerate(models())
        if kind in EVERY_DAY or number % 3 == 0  # a third of them are run: joined, place and parted in other pairs
    ],
)
@torch.no_grad()
def test_batches_joined_and_parted(kind: Joined) -> None:
    """Exact passes only reorder sums, a few roundings of float32 apart: 1e-5."""
    net, exact = shared_model(kind), optimised(kind, flops_budget=1.0).graph_module
    for sizes in BATCHES:
        inputs = kind.inputs(*sizes)
        assert apart(exact(*inputs), net(*inputs)) < 1e-5
    fast = optimised(kind, flops_budget=BUDGET)
    assert not fast.schedule.removes_nothing
    for sizes in BATCHES:
        inputs = kind.inputs(*sizes)
        assert flops(fast.graph_module, inputs) <= BUDGET * flops(net, inputs)
        assert 1e-3 < apart(fast.graph_module(*inputs), net(*inputs)) < 2


@pytest.mark.parametrize("kind", [EVERY_DAY[0], pytest.param(EVERY_DAY[1], marks=pytest.mark.nightly)], ids=str)
@torch.no_grad()
def test_both_doors_agree_while_the_batch_changes(kind: Joined) -> None:
    torch._dynamo.reset()
    door = Door(flops_budget=BUDGET)
    compiled, fast = torch.compile(shared_model(kind), backend=door), optimised(kind, flops_budget=BUDGET)
    for sizes in (*BATCHES, (4, 6)):
        inputs = kind.inputs(*sizes)
        assert apart(compiled(*inputs), fast.graph_module(*inputs)) < 1e-4
    assert not door.refused


class Crops(nn.Module):
    """Two sizes of crops, each a batch of its own, through one encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.blocks, self.head = nn.Sequential(*(Block() for _ in range(3))), nn.Linear(WIDTH, 5)

    def forward(self, large: Tensor, small: Tensor) -> Tensor:
        features = [self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1) for x in (large, small)]
        return self.head(torch.cat(features))  # type: ignore[no-any-return]


@pytest.mark.nightly
@torch.no_grad()
def test_crops_of_two_sizes_are_two_streams() -> None:
    torch.manual_seed(0)
    net = Crops().eval()
    example, other = (
        (torch.randn(large, 3, SIDE, SIDE), torch.randn(small, 3, SIDE // 2, SIDE // 2))
        for large, small in ((2, 6), (3, 2))
    )
    exact = gtp_fx.optimize(net, flops_budget=1.0, example_inputs=example, compile=False)
    fast = gtp_fx.optimize(net, flops_budget=0.8, example_inputs=example, compile=False)
    for inputs in (example, other):
        assert apart(exact(*inputs), net(*inputs)) < 1e-5
        assert apart(fast(*inputs), net(*inputs)) > 1e-3
    equal = (torch.randn(4, 3, SIDE, SIDE), torch.randn(4, 3, SIDE // 2, SIDE // 2))
    assert flops(fast, equal) <= 0.8 * flops(net, equal)


class Doubled(nn.Module):
    """Work on a batch, and on it with a template."""

    def forward(self, x: Tensor, template: Tensor) -> tuple[Tensor, ...]:
        both = torch.cat([x, template[:1]])
        halves = torch.cat([x, x]).chunk(2)
        return both.flatten(1), both[1:] + x, halves[0] + halves[1], torch.cat([both, x])


def test_no_size_that_holds_a_symbol_is_written_as_a_number() -> None:
    gm = captured(_Doubled())
    joined = next(node for node in gm.graph.nodes if node.target is aten.cat.default)
    size = shape_of(joined)[0]
    assert is_symbolic(size)
    assert [at_batch(size, batch) for batch in (1, 2, 7)] == [2, 3, 8]
    assert divided(6 * size, 3) == 2 * size
    assert divided(size, 2) is None, "whatever its value at the primes"
    assert written((size, 3 * size, 12)) == [-1, -1, 12]
    with gm.graph.inserting_after(joined):
        for wrong in (size, 4 * size, size + 5):
            with pytest.raises(AssertionError, match="written as a number"):
                call(gm.graph, aten.reshape.default, joined, [wrong, -1], like=joined)
    with pytest.raises(AssertionError, match="written as a number"):
        set_args(joined, (joined.args[0], size))


class _Doubled:
    def model(self) -> nn.Module:
        return Doubled()

    def inputs(self) -> tuple[Tensor, ...]:
        return torch.randn(3, 4, 5), torch.randn(2, 4, 5)


def test_more_open_sizes_than_can_be_told_apart_are_refused_by_name() -> None:
    """As where tokens are picked by what they hold, and Dynamo makes each count a size of its own."""
    gm = make_fx(lambda x: x + 1, tracing_mode="symbolic")(torch.ones(3, 5, 7))
    with pytest.raises(gtp_fx.CaptureError, match="more of its sizes are known only"):
        fix_symbols(gm)


def test_the_larger_of_two_sizes_is_none_of_them() -> None:
    """Which one it is isn't known, and its value at the primes is one of theirs."""
    gm = make_fx(lambda x, y: (x + 1, y + 1), tracing_mode="symbolic")(torch.ones(5), torch.ones(7))
    values = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    a, b = (value.shape[0] for value in values)
    larger = torch.sym_max(a, b)
    gm.graph.find_nodes(op="placeholder")[0].meta["val"] = (*values, values[0].new_empty(larger))
    with pytest.raises(gtp_fx.CaptureError, match="can't be told apart"):
        fix_symbols(gm)
