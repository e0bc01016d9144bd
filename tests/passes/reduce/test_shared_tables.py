"""Two streams that read one table take their own tokens' rows of it, also where they are of one size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gtp_fx

CHANNELS, HEADS, SIDE = 16, 2, 6


class Block(nn.Module):
    """Pre-norm block whose attention has a bias that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.qkv, self.proj = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.mlp = nn.Sequential(nn.Linear(CHANNELS, 64), nn.GELU(), nn.Linear(64, CHANNELS))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Pair(nn.Module):
    """Two encoders of two pictures, each with a position table and a bias; one of each for both where they share."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embeds = nn.ModuleList(nn.Conv2d(3, CHANNELS, 4, 4) for _ in range(2))
        self.blocks = nn.ModuleList(nn.ModuleList(Block() for _ in range(3)) for _ in range(2))
        bias = torch.randn(1, HEADS, SIDE**2, SIDE**2)
        self.bias = nn.Parameter(bias)
        self.other = self.bias if shared else nn.Parameter(bias.clone())

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        found = []
        for image, embed, blocks, bias in zip((a, b), self.embeds, self.blocks, (self.bias, self.other), strict=True):
            x = embed(image).flatten(2).transpose(1, 2)
            for block in blocks:
                x = block(x, bias)
            found.append(x.mean(1))
        return torch.cat(found, 1)


@pytest.mark.nightly
@torch.no_grad()
def test_a_bias_that_two_streams_share_is_each_ones_own() -> None:
    images = tuple(torch.randn(2, 3, 4 * SIDE, 4 * SIDE) for _ in range(2))
    for schedule in ([9, 0, 0, 9, 0, 0], [9, 6, 0, 4, 9, 0]):  # as many tokens left in both, or others
        found, wanted = (
            gtp_fx.optimize(Pair(shared).eval(), schedule=schedule, compile=False, example_inputs=images)(*images)
            for shared in (True, False)
        )
        torch.testing.assert_close(found, wanted)
