"""A model of your own: no library's blocks, nothing registered anywhere.

python examples/own_model.py
"""

from __future__ import annotations

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

import gtp_fx
from gtp_fx.model.preview import inspect_model


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class MyViT(nn.Module):
    """Images [B, 3, 96, 96] to logits [B, 10]."""

    def __init__(self, width: int = 128, heads: int = 4, depth: int = 6) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.summary = nn.Parameter(torch.randn(1, 1, width))
        self.places = nn.Parameter(0.1 * torch.randn(1, 145, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.head = nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.summary.expand(len(x), -1, -1), x], dim=1) + self.places
        return self.head(self.blocks(x)[:, 0])


def main() -> None:
    """Look at a model of your own, optimise it, and see what a refusal says."""
    model = MyViT().eval()
    images = torch.randn(2, 3, 96, 96)  # a model without timm's or Hugging Face's configuration needs an example
    print(inspect_model(model, images), end="\n\n")
    fast = gtp_fx.optimize(model, flops_budget=0.6, example_inputs=images, compile=False)
    print(fast.report, end="\n\n")
    print(f"logits {list(fast(torch.randn(5, 3, 96, 96)).shape)}: any batch")
    try:
        gtp_fx.optimize(model, flops_budget=0.05, example_inputs=images)
    except gtp_fx.BudgetError as error:
        print(f"and what can't be done is refused: {error}")


if __name__ == "__main__":
    typer.run(main)
