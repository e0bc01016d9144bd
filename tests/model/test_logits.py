"""A model whose logits are spelled out is reduced as the same one with fused attention is: one schedule, one result."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gtp_fx

SIDE, HEADS, WIDTH = 6, 2, 16
TOKENS, FEATURES = SIDE * SIDE, WIDTH // HEADS


class Attention(nn.Module):
    """Fused attention with what `mask` gives, or the same spelled out; q, k, v: [B, heads, tokens, features]."""

    def mask(self, q: Tensor) -> Tensor | None:
        return None

    def fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(q))

    def spelled(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError


class Itself(Attention):
    """No token looks at itself."""

    def mask(self, q: Tensor) -> Tensor:
        return torch.zeros(TOKENS, TOKENS).masked_fill(torch.eye(TOKENS, dtype=torch.bool), -math.inf)

    def spelled(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = q @ k.transpose(-1, -2) / math.sqrt(FEATURES)
        return logits.masked_fill(torch.eye(TOKENS, dtype=torch.bool), -math.inf).softmax(-1) @ v


class Decomposed(Attention):
    """A bias by row and one by column, each a product of the query with a table."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns = (nn.Parameter(torch.randn(SIDE, SIDE, FEATURES)) for _ in range(2))

    def parts(self, q: Tensor) -> tuple[Tensor, Tensor]:
        grid = q.reshape(-1, SIDE, SIDE, FEATURES)
        rows, columns = "byxc,ykc->byxk", "byxc,xkc->byxk"
        return torch.einsum(rows, grid, self.rows)[..., None], torch.einsum(columns, grid, self.columns)[..., None, :]

    def mask(self, q: Tensor) -> Tensor:
        rows, columns = self.parts(q)
        return (rows + columns).reshape(-1, HEADS, TOKENS, TOKENS)

    def spelled(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.reshape(-1, TOKENS, FEATURES) for t in (q, k, v))
        rows, columns = self.parts(q)
        logits = ((q * FEATURES**-0.5) @ k.transpose(-2, -1)).view(-1, SIDE, SIDE, SIDE, SIDE) + rows + columns
        return (logits.view(-1, TOKENS, TOKENS).softmax(-1) @ v).view(-1, HEADS, TOKENS, FEATURES)


class OneKeyHead(Attention):
    """Every head has the first one's keys and values."""

    def fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k[:, :1].expand_as(q), v[:, :1].expand_as(q))

    def spelled(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = torch.einsum("b h i d, b j d -> b h i j", q, k[:, 0]) * FEATURES**-0.5
        return torch.einsum("b h i j, b j d -> b h i d", logits.softmax(-1), v[:, 0])


class Block(nn.Module):
    def __init__(self, attention: Attention, spelled: bool) -> None:
        super().__init__()
        self.attention, self.is_spelled = attention, spelled
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).reshape(-1, TOKENS, 3, HEADS, FEATURES).permute(2, 0, 3, 1, 4).unbind(0)
        attended = (self.attention.spelled if self.is_spelled else self.attention.fused)(q, k, v)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Net(nn.Module):
    """Three blocks over 6 x 6 patches; [B, 16] of images [B, 3, 24, 24]."""

    def __init__(self, attention: type[Attention], spelled: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.blocks = nn.Sequential(*(Block(attention(), spelled) for _ in range(3)))

    def forward(self, image: Tensor) -> Tensor:
        return self.blocks(self.patches(image).flatten(2).transpose(1, 2)).mean(1)  # type: ignore[no-any-return]


def built(attention: type[Attention], spelled: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(attention, spelled).eval().requires_grad_(False)


@pytest.mark.parametrize(
    "attention", [Decomposed, *(pytest.param(kind, marks=pytest.mark.nightly) for kind in (Itself, OneKeyHead))]
)
def test_spelled_out_it_is_reduced_as_fused_attention_is(attention: type[Attention]) -> None:
    """Both do the same sums in another order: 1e-5 of the largest output is a hundred times float32's rounding."""
    images = [torch.randn(n, 3, 24, 24, generator=torch.Generator().manual_seed(n)) for n in (2, 3)]
    spelled, fused = (built(attention, spelled) for spelled in (True, False))
    exact = gtp_fx.optimize(spelled, flops_budget=1.0, example_inputs=images[0], compile=False)
    for batch in images:
        torch.testing.assert_close(exact(batch), spelled(batch), rtol=0, atol=1e-5)
    reduced, wanted = (
        gtp_fx.optimize(model, flops_budget=0.7, example_inputs=images[0], compile=False) for model in (spelled, fused)
    )
    sites = [[site.removed for site in made.report.sites] for made in (reduced, wanted)]
    assert sites[0] == sites[1]
    assert sum(sites[0]) > 0
    torch.testing.assert_close(reduced(images[1]), wanted(images[1]), rtol=0, atol=1e-5)
    assert (reduced(images[1]) - spelled(images[1])).abs().max() > 1e-3, "something was removed"
