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


class Mapped(nn.Module):
    """Blocks that hand a map [B, H, W, C] on and attend to [B, H * W, C], with a convolution between, as TinyViT's."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.qkv, self.out, self.conv = (
            nn.ModuleList(made) for made in zip(*[self._block() for _ in range(2)], strict=True)
        )
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2))

    @staticmethod
    def _block() -> tuple[nn.Module, nn.Module, nn.Module]:
        return nn.Linear(32, 96), nn.Linear(32, 32), nn.Conv2d(32, 32, 3, padding=1, groups=32)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        for qkv, out, conv, mlp in zip(self.qkv, self.out, self.conv, self.mlps, strict=True):
            q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in qkv(x.reshape(b, h * w, c)).chunk(3, -1))
            attended = nn.functional.scaled_dot_product_attention(q, k, v)
            x = x + out(attended.transpose(1, 2).reshape(b, h * w, c)).view(b, h, w, c)
            x = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).reshape(b, h * w, c)
            x = (x + mlp(x)).view(b, h, w, c)  # which the next block's first reshape undoes
        return x.mean((1, 2))  # type: ignore[no-any-return]


@torch.no_grad()
def test_a_stream_may_be_read_as_tokens_and_added_as_a_map() -> None:
    model, x = enliven(Mapped()).eval(), torch.randn(2, 3, 64, 64)
    fast = gtp_fx.optimize(model, schedule=[30, 30], example_inputs=x, compile=False)
    assert [site.removed for site in fast.report.sites] == [30, 30]
    exact = gtp_fx.optimize(model, flops_budget=1.0, example_inputs=x, compile=False)
    torch.testing.assert_close(exact(x), model(x), rtol=1e-5, atol=1e-5)
