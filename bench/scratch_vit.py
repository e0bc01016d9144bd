"""A vision transformer as somebody would write it from scratch, with einops: no library's blocks, no known names."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Attention spelled out, as in many a notebook."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.query_key_value(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        weights = (torch.einsum("bhid,bhjd->bhij", q, k) * self.scale).softmax(dim=-1)
        return self.out(rearrange(torch.einsum("bhij,bhjd->bhid", weights, v), "b h n d -> b n (h d)"))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before_attention = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.before_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before_attention(x))
        return x + self.mlp(self.before_mlp(x))


class ScratchViT(nn.Module):
    """image [B, 3, size, size] -> logits [B, classes]. Patches are cut out by einops, without a convolution."""

    def __init__(
        self, size: int = 224, patch: int = 16, width: int = 384, depth: int = 12, heads: int = 6, classes: int = 10
    ) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(3 * patch * patch, width)
        self.summary = nn.Parameter(torch.randn(width))
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, width))
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, image: Tensor) -> Tensor:
        patches = rearrange(image, "b c (h p) (w q) -> b (h w) (p q c)", p=self.patch, q=self.patch)
        x = self.embed(patches)
        x = torch.cat([repeat(self.summary, "d -> b 1 d", b=len(x)), x], dim=1) + self.position
        return self.head(self.norm(self.layers(x))[:, 0])
