"""Streams in other layouts, and tokens born in other ways: one ViT spelled so, held to the spelling that all know.

The spelling that all know is the oracle at a budget, and eager PyTorch at 1.0.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ops import aten

import gtp_fx
from bench.spelling_models import LAYOUTS, Spelling
from bench.spellings import check
from gtp_fx.graph.verify import propagate_shapes
from gtp_fx.passes.exact.fold_views import fold_views
from gtp_fx.passes.exact.matmul_to_linear import matmul_to_linear
from gtp_fx.passes.exact.normalise import normalise

from support.graphs_by_hand import calls, traced

WIDTH, HEADS, SIDE, GRID = 32, 4, 4, 6


@pytest.mark.parametrize(
    "spelling",
    [
        pytest.param({"layout": "[N, B, C]"}, marks=pytest.mark.nightly),
        pytest.param({"layout": "[N, B, C], einsum"}, marks=pytest.mark.nightly),
        pytest.param({"layout": "[B, C, N]", "linear": "conv1d"}, marks=pytest.mark.nightly),
        pytest.param({"layout": "[B, C, N], whole block"}, marks=pytest.mark.nightly),
        pytest.param({"layout": "[N, B, C], whole block"}, marks=pytest.mark.nightly),
        pytest.param({"linear": "conv1d"}, marks=pytest.mark.nightly),
        pytest.param({"patches": "Tensor.unfold"}, marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_a_spelling_is_reduced_as_the_canonical_one(spelling: dict[str, str]) -> None:
    assert spelling.get("layout", "[B, N, C]") in LAYOUTS
    assert check(Spelling(**spelling)) == "right"


class Series(nn.Module):
    """A ViT over a series or over pictures. `patches` makes the tokens [B, N, WIDTH]; `block` may be any."""

    def __init__(self, patches: nn.Module, batch_first: bool = True) -> None:
        super().__init__()
        self.patches, self.batch_first = patches, batch_first
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=batch_first, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)
        return (self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1)).mean(1)


class Convolved(nn.Module):
    """Patches by a convolution: of each of several groups of channels, end to end, or stacked in a dimension."""

    def __init__(self, convolution: nn.Module, groups: int = 1, stacked_in: int = 0) -> None:
        super().__init__()
        self.convolution, self.groups, self.stacked_in = convolution, groups, stacked_in

    def forward(self, x: Tensor) -> Tensor:
        if self.stacked_in:
            return torch.stack(self.parts(x), self.stacked_in).flatten(1, 2)
        return torch.cat(self.parts(x), 1)

    def parts(self, x: Tensor) -> list[Tensor]:
        return [self.convolution(part).flatten(2).mT for part in x.chunk(self.groups, 1)]


class Grouped(Convolved):
    """The same, each group's patches with a vector of their group's, which is added to all of them stacked or before.

    vectors: [groups, WIDTH].
    """

    def __init__(self, convolution: nn.Module, stacked: bool) -> None:
        super().__init__(convolution, groups=2)
        self.stacked, self.vectors = stacked, nn.Parameter(torch.randn(2, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.parts(x)
        if self.stacked:
            return (torch.stack(parts, 1) + self.vectors[:, None]).flatten(1, 2)
        return torch.cat([part + vector for part, vector in zip(parts, self.vectors, strict=True)], 1)


class Viewed(nn.Module):
    """The same patches of a series by a view and a linear layer."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(2, (-1, SIDE)).permute(0, 2, 1, 3).flatten(2)
        return F.linear(x, self.convolution.weight.flatten(1), self.convolution.bias)


def same(make: Callable[[], nn.Module]) -> nn.Module:
    """Build a model with the parameters that every other of its kind gets."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval().requires_grad_(False)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def must_agree(made: nn.Module, known: nn.Module, *shape: int) -> None:
    """Hold a model to one of the same numbers, whole on two batches, and with the same tokens removed."""
    example, other = noise(2, *shape), noise(3, *shape)
    exact = gtp_fx.optimize(made, flops_budget=1.0, example_inputs=example, compile=False)
    for x in (example, other):
        torch.testing.assert_close(exact(x), made(x), atol=1e-5, rtol=1e-5)
    fast, wanted = (
        gtp_fx.optimize(model, schedule=[6, 5, 0], example_inputs=example, compile=False) for model in (made, known)
    )
    assert fast.report.flops_ratio == pytest.approx(wanted.report.flops_ratio, abs=1e-6)
    assert (wanted(other) - known(other)).abs().max() > 1e-3
    torch.testing.assert_close(fast(other), wanted(other), atol=1e-5, rtol=1e-5)


@pytest.mark.nightly
def test_an_encoder_with_tokens_first() -> None:
    made, known = (
        same(lambda first=first: Series(Convolved(nn.Conv2d(3, WIDTH, SIDE, SIDE)), first)) for first in (False, True)
    )
    must_agree(made, known, 3, GRID * SIDE, GRID * SIDE)


@pytest.mark.nightly
def test_a_series_cut_by_views() -> None:
    made, known = (same(lambda how=how: Series(how(nn.Conv1d(2, WIDTH, SIDE, SIDE)))) for how in (Viewed, Convolved))
    must_agree(made, known, 2, 30 * SIDE)


def test_patches_of_several_pictures() -> None:
    model = same(lambda: Series(Convolved(nn.Conv2d(3, WIDTH, SIDE, SIDE), groups=2)))
    x = noise(3, 6, GRID * SIDE, GRID * SIDE)
    fast = gtp_fx.optimize(model, flops_budget=0.74, example_inputs=x[:2], compile=False)
    assert fast.report.flops_ratio <= 0.74
    assert [provenance.grid for provenance in fast.provenance(x)] == [(2, GRID, GRID)]
    assert 0 < (fast(x) - model(x)).abs().max() < 1


@pytest.mark.nightly
@pytest.mark.parametrize("stacked_in", [1, 2])
def test_patches_of_several_pictures_after_each_other_or_by_turns(stacked_in: int) -> None:
    made, known = (
        same(lambda dim=dim: Series(Convolved(nn.Conv2d(3, WIDTH, SIDE, SIDE), 2, dim))) for dim in (stacked_in, 0)
    )
    must_agree(made, known, 6, GRID * SIDE, GRID * SIDE)


@pytest.mark.nightly
def test_patches_of_several_groups_that_are_stacked_first() -> None:
    made, known = (
        same(lambda stacked=stacked: Series(Grouped(nn.Conv2d(3, WIDTH, SIDE, SIDE), stacked)))
        for stacked in (True, False)
    )
    must_agree(made, known, 6, GRID * SIDE, GRID * SIDE)


def test_neighbours_are_of_ones_own_grid() -> None:
    x = torch.zeros(1, 24, 1)
    _, apart = torch.ops.gtp_fx.token_graph(x, [-2, 3, 4], 0, "spatial", 1)
    _, alone = torch.ops.gtp_fx.token_graph(x[:, :12], [3, 4], 0, "spatial", 1)
    torch.testing.assert_close(apart, alone.repeat(1, 2))
    # Everything but the first patch of the second grid leaves the second grid: nothing of it reaches the first.
    kept, removed = torch.arange(13)[None], torch.arange(13, 24)[None]
    weights = torch.ops.gtp_fx.propagation_weights(
        torch.zeros(1, 24, 0).long(), apart, kept, removed, [-2, 3, 4], "spatial"
    )
    assert not weights[:, :12].any() and weights[:, 12].count_nonzero() == 3
    # A patch without neighbours left comes back as the nearest of its own grid.
    shares = torch.ops.gtp_fx.recovery_weights(None, kept, removed, [-2, 3, 4])
    assert (shares.argmax(-1) == 12).all()


class Rotary(nn.Module):
    """One block whose queries and keys are turned by a table [1, N, D], heads apart or merged into the batch."""

    def __init__(self, merged: bool) -> None:
        super().__init__()
        self.merged, self.norm, self.qkv = merged, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.table = nn.Parameter(torch.randn(1, GRID * GRID, WIDTH // HEADS))

    def forward(self, x: Tensor) -> Tensor:
        batch, count, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(batch, count, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.merged:
            q, k, v = (t.reshape(batch * HEADS, count, -1) for t in (q, k, v))
        q, k = (t * self.table.cos() + t.roll(1, -1) * self.table.sin() for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v)
        if self.merged:
            y = y.unflatten(0, (batch, HEADS))
        return x + self.out(y.transpose(1, 2).reshape(batch, count, -1))


@pytest.mark.nightly
def test_a_table_for_all_images_where_heads_are_in_the_batch() -> None:
    made, known = (
        same(
            lambda how=how: nn.Sequential(
                Convolved(nn.Conv2d(3, WIDTH, SIDE, SIDE)), Rotary(how), Rotary(how), Rotary(how)
            )
        )
        for how in (True, False)
    )
    must_agree(made, known, 3, GRID * SIDE, GRID * SIDE)


def detour(x: Tensor, w: Tensor) -> Tensor:
    """[N, B, C] -> [B, H, N, D], by a linear layer on [N·B, C] and heads merged with images."""
    count, batch, width = x.shape
    x = F.linear(x.reshape(count * batch, width), w).reshape(count, batch, width)
    return x.reshape(count, batch * 2, width // 2).transpose(0, 1).reshape(batch, 2, count, width // 2)


def test_merged_dimensions_that_are_taken_apart_stay_apart() -> None:
    x, w = noise(5, 3, 8), noise(8, 8)
    gm = normalise(traced(detour, x, w))
    apart = matmul_to_linear(gm)
    propagate_shapes(apart, "matmul_to_linear")
    folded = fold_views(apart)
    assert (calls(gm, aten.reshape.default), calls(folded, aten.reshape.default)) == (4, 1)
    assert calls(folded, aten.permute.default) == 1
    torch.testing.assert_close(folded(x, w), detour(x, w))


def test_a_chain_that_takes_nothing_apart_is_kept() -> None:
    gm = normalise(traced(lambda x: x.reshape(3, 4, 2).transpose(0, 1).reshape(4, 6).sin(), noise(12, 2)))
    assert fold_views(gm) is gm
