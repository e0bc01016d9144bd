"""Operators of branch placement against loops, and what a branch costs against torch's own count."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.ops import gtp_fx as ops
from torch.utils.flop_counter import FlopCounterMode

import gtp_fx
from bench.live_weights import enliven
from bench.scratch_vit import Layer
from gtp_fx.strategies import Regeneration

from support.zoo import in_tiers


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def share_by_hand(places: list[tuple[int, int]], kept: list[int], left: int) -> list[float]:
    """Of one token of a window: what each kept one has in its result."""

    def touch(a: int, b: int) -> bool:
        apart = max(abs(x - y) for x, y in zip(places[a], places[b], strict=True))
        return apart == 1

    degree = [sum(touch(a, b) for b in range(len(places))) for a in range(len(places))]
    edges = [touch(k, left) * degree[k] ** -0.5 if degree[k] else 0.0 for k in kept]
    if not sum(edges):
        squares = [sum((x - y) ** 2 for x, y in zip(places[k], places[left], strict=True)) for k in kept]
        edges = [float(i == squares.index(min(squares))) for i in range(len(kept))]
    return [edge / sum(edges) for edge in edges]


def test_shares_along_edges_on_the_image() -> None:
    """Two windows of 2 x 3, the second rolled over the border: its halves are far apart on the image and share none."""
    first = [(row, column) for row in (0, 1) for column in (0, 1, 2)]
    second = [(row, column) for row in (0, 1) for column in (9, 0, 1)]
    kept = torch.tensor([[0, 2, 4], [1, 2, 5], [0, 1, 2], [0, 3, 5]])
    left = torch.tensor([[1, 3, 5], [0, 3, 4], [3, 4, 5], [1, 2, 4]])
    found = ops.region_shares(torch.tensor([first, second]), kept, left)
    for row in range(4):
        places = (first, second)[row % 2]
        wanted = [share_by_hand(places, kept[row].tolist(), token) for token in left[row].tolist()]
        torch.testing.assert_close(found[row], torch.tensor(wanted))
    torch.testing.assert_close(found.sum(-1), torch.ones(4, 3))


def test_places_of_a_grid() -> None:
    places = ops.grid_places([2, 3], torch.zeros(1))
    assert places.shape == (1, 2, 3, 2)
    assert places[0, 1, 2].tolist() == [1, 2]


@pytest.mark.parametrize("score", ["mixed-max", "mixed-mean", "broadcast-max", "regenerate-mean"])
def test_attention_to_pooled_keys_ranks_its_queries(score: str) -> None:
    """A 4 x 6 grid, keys for cells of 2 x 3: what a token pays its cell, times what its cell receives."""
    q, k, v = noise(2, 3, 24, 8), noise(2, 3, 4, 8, seed=1), noise(2, 3, 4, 8, seed=2)
    out, scores = ops.attention_with_cell_scores(q, k, v, None, None, score, [4, 6], [2, 2])
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))
    attention = (q @ k.mT * 8**-0.5).softmax(-1)
    kind, _, over = score.partition("-")
    for image in range(2):
        for token in range(24):
            cell = (token // 6 // 2) * 2 + token % 6 // 3
            regenerate, broadcast = attention[image, :, token, cell], attention[image, :, :, cell].sum(-1)
            factors = [
                f for name, f in (("regenerate", regenerate), ("broadcast", broadcast)) if kind in (name, "mixed")
            ]
            wanted = torch.stack([f.max() if over == "max" else f.mean() for f in factors]).prod()
            torch.testing.assert_close(scores[image, token], wanted)


class Map(nn.Module):
    """Returns a map, and has a convolution behind every block, so that the grid has to stay whole."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 8, 8)
        self.blocks = nn.ModuleList(Layer(32, 4) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(32, 32, 3, padding=1, groups=32) for _ in range(2))

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image)
        for block, conv in zip(self.blocks, self.convs, strict=True):
            x = block(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)
            x = x + conv(x)
        return x


@pytest.mark.parametrize("schedule", in_tiers([[10, 0], [0, 10], [20, 5]], [10, 0], [0, 10]))
def test_flops_of_branches_are_the_counters(schedule: list[int]) -> None:
    fast = counted(schedule, Regeneration(windows="skip"))
    rows = {row.block: row for row in fast.report.sites}
    assert {block: row.removed for block, row in rows.items()} == {i: n for i, n in enumerate(schedule) if n}
    assert all(row.windows and row.tokens_in == 49 for row in rows.values())
    assert "branch, 4 windows" in str(fast.report) or 0 not in rows


@pytest.mark.parametrize("share", in_tiers([0.85, 0.0], 0.0))
def test_flops_of_windows_that_rest_are_the_counters(share: float) -> None:
    fast = counted([3, 5], Regeneration(rest_share=share))
    assert [(row.window_tokens, row.windows) for row in fast.report.sites] == [(49, 0), (0, 1)]


@torch.no_grad()
def counted(schedule: list[int], strategy: Regeneration) -> gtp_fx.OptimizedModel:
    """A net with windows on this schedule, whose FLOPs by torch's counter are those that its report has."""
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1), num_heads=(2, 4), embed_dim=32, num_classes=10
    )
    x = noise(1, 3, 56, 56)
    asked: dict[str, Any] = {"schedule": schedule, "strategy": strategy}
    fast = gtp_fx.optimize(enliven(model).eval(), **asked, example_inputs=x, compile=False)
    with FlopCounterMode(display=False) as counter:  # on meta: some releases count a CPU's fused attention as nothing
        gm = fast.graph_module.to("meta")
        for name, table in [(name, value) for name, value in vars(gm).items() if isinstance(value, Tensor)]:
            setattr(gm, name, table.to("meta"))  # constants that a pass added are no buffers, and aren't moved
        gm(x.to("meta"))
    assert counter.get_total_flops() == fast.report.flops_after
    return fast


@torch.no_grad()
def test_tokens_leave_a_stream_or_skip_a_branch_by_what_the_graph_needs() -> None:
    """Tokens are restored for the convolution after each block, so they can be removed; in windows they can't."""
    model, x = enliven(Map()).eval(), noise(2, 3, 64, 64)
    fast = gtp_fx.optimize(model, schedule=[20, 0], example_inputs=x, compile=False)
    assert fast(x).shape == model(x).shape
    assert ((fast(x) - model(x)).abs().max() / model(x).abs().max()) > 1e-4


def test_a_branch_option_that_is_unknown() -> None:
    with pytest.raises(gtp_fx.OptionError, match="'recover'"):
        gtp_fx.GTP(branch="forget")
