"""A ViT written out in few lines, whose parts tests replace: a CLS token, 4 x 4 patches, two blocks of 16 channels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """A pre-norm block; `attend` and `join` are there to be overridden."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def join(self, x: Tensor, attended: Tensor) -> Tensor:
        return x + attended

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        x = self.join(x, self.out(self.attend(q, k, v).transpose(1, 2).flatten(2)))
        return x + self.mlp(x)


class TinyViT(nn.Module):
    """Images [B, 3, 16, 16] to features [B, 16], the mean over all tokens."""

    def __init__(self, block: Callable[[], nn.Module] = Block, depth: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.cls, self.places = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 17, 16))
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.eval().requires_grad_(False)

    def tokens(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        return torch.cat([self.cls.expand(x.shape[0], -1, -1), patches], dim=1) + self.places

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


def pictures(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch))
