"""Why a block has no branch to skip: named, with its layer."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gtp_fx
from bench.live_weights import enliven

from support.window_families import HIERA, SAM, from_hf


def refusals(model: nn.Module, x: Tensor) -> str:
    """What is said of blocks that are left as they are."""
    try:
        fast = gtp_fx.optimize(enliven(model).eval(), flops_budget=0.98, example_inputs=x, compile=False)
    except gtp_fx.UnsupportedModelError as error:
        return str(error)
    return "\n".join(map(str, fast.report.refusals))


class GroupNormed(nn.Module):
    """A map [B, C, H, W] whose MLP ends in a norm over groups of channels and all places, which needs the whole map."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.qkv, self.out = nn.Conv2d(3, 32, 8, 8), nn.Conv2d(32, 96, 1), nn.Conv2d(32, 32, 1)
        self.mlp = nn.Sequential(nn.Conv2d(32, 64, 1), nn.GELU(), nn.Conv2d(64, 32, 1), nn.GroupNorm(4, 32))

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image)
        q, k, v = (t.unflatten(1, (2, 16)).flatten(3).mT for t in self.qkv(x).chunk(3, 1))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape))
        return x + self.mlp(x)  # type: ignore[no-any-return]


SEGFORMER = from_hf("SegformerForImageClassification", depths=[1] * 4, num_labels=10)


@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "shape", "reason"),
    [
        (GroupNormed, (3, 64, 64), "ends in aten.group_norm.default .*, which needs all of its tokens in their places"),
        # Convolutions with stride 8, 4 and 2 over 50, 25 and 13 rows: the keys' cells are not all alike.
        pytest.param(
            SEGFORMER,
            (3, 200, 200),
            "segformer.stages.0.blocks.0.attention .*queries and keys run over different",
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            HIERA.model,
            (3, 64, 96),
            "blocks.2.attn .*queries and keys run over different patch tokens",
            marks=pytest.mark.nightly,
        ),
    ],
    ids=["a norm over all places", "cells that don't divide", "queries that are pooled"],
)
def test_why_a_block_has_no_branch(make: Callable[[], nn.Module], shape: tuple[int, ...], reason: str) -> None:
    assert re.search(reason, refusals(make(), torch.randn(2, *shape)))


class ConvMlp(nn.Module):
    """Only the activation behind its convolution is token-wise: nothing worth skipping."""

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.conv, self.grid = nn.Conv2d(dim, dim, 3, padding=1), grid

    def forward(self, x_BNC: Tensor) -> Tensor:
        return self.conv(x_BNC.transpose(1, 2).unflatten(2, self.grid)).flatten(2).transpose(1, 2).relu()


@torch.no_grad()
def test_a_convolution_at_the_end_of_a_branch_is_named() -> None:
    model: Any = SAM.model()
    for block in model.blocks:
        block.mlp = ConvMlp(64, (10, 12))
    with pytest.raises(gtp_fx.UnsupportedModelError, match=r"ends in aten.conv2d.default \[.*\], which needs all"):
        gtp_fx.optimize(model, schedule=[3, 3], example_inputs=SAM.inputs(), compile=False)
