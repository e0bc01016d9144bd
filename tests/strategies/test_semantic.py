"""Cells of semantic tokens: exact in number for any count, nested, square where a square of them is asked for.

What the strategy does with them equals the reference in test_strategies.py; how patches come back is here.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import gtp_fx
from gtp_fx.strategies import Semantic, Tokens
from gtp_fx.strategies.semantic import RECOVERIES, cells

from support import reference_strategies as by_hand
from support.captured import Built, optimised
from support.plain_vit import built
from support.zoo import BY_NAME, enliven, in_tiers


@pytest.mark.parametrize("grid", [[6, 5], [7, 7], [1, 9], [11], [3, 4, 2], [-3, 2, 3]], ids=str)
def test_any_number_of_cells_is_had_and_fewer_are_unions_of_more(grid: list[int]) -> None:
    patches = math.prod(map(abs, grid))
    finer, _ = cells(tuple(grid), patches)
    assert len(set(finer)) == patches
    for count in range(patches - 1, 0, -1):
        coarser, _ = cells(tuple(grid), count)
        assert len(set(coarser)) == count
        assert len(set(zip(finer, coarser, strict=True))) == count + 1, "a cell for more tokens is in one for fewer"
        finer = coarser


def test_pictures_are_told_apart_first() -> None:
    number, _ = cells((-3, 2, 4), 3)
    assert [len(set(number[first : first + 8])) for first in (0, 8, 16)] == [1, 1, 1] and len(set(number)) == 3


def seen(x_BnC: Tensor, removed: int) -> Tokens:
    index_Bn = torch.arange(x_BnC.shape[1]).expand(x_BnC.shape[0], -1)
    return Tokens(x_BnC, None, None, None, None, index_Bn, None, (8, 8), removed, 0, 0, 0)


@pytest.mark.parametrize("side", [2, 4])
def test_a_square_of_cells_is_adaptive_pooling(side: int) -> None:
    """To 1e-6: sums of up to 16 numbers of float32, in another order."""
    x_BnC = torch.randn(2, 64, 5, generator=torch.Generator().manual_seed(0))
    groups = Semantic().group(seen(x_BnC, 64 - side**2))
    assert groups.weights_BKP is not None and groups.own_BK is not None and groups.size_BK is not None
    kept, removed = (
        x_BnC.gather(1, index[..., None].expand(-1, -1, 5)) for index in (groups.kept_BK, groups.removed_BP)
    )
    found = groups.own_BK[..., None] * kept + groups.weights_BKP @ removed
    wanted = F.adaptive_avg_pool2d(x_BnC.mT.reshape(2, 5, 8, 8), side).flatten(2).mT
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert (groups.size_BK == 64 / side**2).all()


def dense(**kwargs: Any) -> VisionTransformer:
    """Returns every token, of 6 x 6 patches and a class token."""
    small = {"depth": 4, "embed_dim": 32, "num_heads": 2, "img_size": 24, "patch_size": 4}
    model = timm.create_model("vit_tiny_patch16_224", **small, num_classes=0, global_pool="", **kwargs)
    return enliven(model).eval()  # type: ignore[no-any-return]


@torch.no_grad()
@pytest.mark.parametrize("schedule", in_tiers([[0, 14, 0, 0], [0, 9, 0, 12]], [0, 14, 0, 0]), ids=str)
def test_removed_patches_are_recovered_as_by_hand(schedule: list[int]) -> None:
    """To 1e-5 of the largest: the reference is float64. FLOPs are those that were priced, or `optimize` would fail."""
    model, x = dense(qk_norm=True), torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    found = {}
    for recovery in RECOVERIES:
        strategy = Semantic(recovery=recovery)
        found[recovery] = gtp_fx.optimize(model, schedule=schedule, strategy=strategy, compile=False)(x)
        choose = functools.partial(by_hand.semantic, sides=(6, 6))
        how = by_hand.Told(choose, before=True, to_all=True, attends=recovery == "attention")
        wanted = by_hand.strategy_reference(model, x, schedule, how)
        assert wanted.shape == (2, 37, 32)
        assert (found[recovery] - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert (found["cells"] - found["attention"]).abs().max() > 1e-2 * found["cells"].abs().max()


class Biased(nn.Module):
    """Two blocks whose logits have a bias, as of relative positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm, self.qkv = nn.Conv2d(3, 32, 4, 4), nn.LayerNorm(32), nn.Linear(32, 96)
        self.bias = nn.Parameter(torch.randn(1, 4, 36, 36))

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).mT
        for _ in range(2):
            q, k, v = self.qkv(self.norm(x)).reshape(-1, 36, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
            x = x + F.scaled_dot_product_attention(q, k, v, self.bias).transpose(1, 2).flatten(2)
            x = x + x.tanh()
        return x


def test_where_the_map_cannot_be_made_it_is_refused() -> None:
    source = Built(lambda: built(Biased), (3, 24, 24))
    assert optimised(source, strategy=Semantic(), schedule=[10, 0]).report.recovered
    with pytest.raises(gtp_fx.UnsupportedModelError, match="its logits have a bias"):
        optimised(source, strategy=Semantic(recovery="attention"), schedule=[10, 0])


def test_recovery_is_one_of_two() -> None:
    with pytest.raises(gtp_fx.OptionError, match="did you mean 'attention'"):
        Semantic(recovery="atention")


class SpelledOut(nn.Module):
    """Attention with its heads mixed between logits and softmax, which no operator does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.mix = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).reshape(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
        logits = self.mix((q @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


class SpelledOutNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(3, 32, 4, 4), nn.Sequential(SpelledOut(), SpelledOut())

    def forward(self, image: Tensor) -> Tensor:
        return self.blocks(self.patches(image).flatten(2).mT).mean(dim=1)  # type: ignore[no-any-return]


def test_where_queries_cannot_be_had_apart_it_is_refused() -> None:
    source = Built(lambda: built(SpelledOutNet), (3, 24, 24))
    assert optimised(source, strategy="tome", flops_budget=0.8).report.flops_ratio <= 0.8
    with pytest.raises(gtp_fx.UnsupportedModelError, match="queries can't be computed apart from keys and values"):
        optimised(source, strategy="semantic", flops_budget=0.8)


def test_blocks_are_taken_apart_for_it_alone() -> None:
    """With no token removed the numbers stay; a rival's graph has no part of it."""
    row = BY_NAME["dinov2"]
    counted = {
        name: optimised(row, strategy=name, flops_budget=1.0).graph_module.code.count("aten.alias")
        for name in ("semantic", "tome")
    }
    assert counted == {"semantic": 3, "tome": 0}
