"""Which arguments [B, N, C] are tokens: those that attention reads as it does an image's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gtp_fx.capture.inputs import call_signature
from gtp_fx.capture.module import capture_module
from gtp_fx.graph.verify import propagate_shapes
from gtp_fx.passes.exact.drop_trivial_masks import drop_trivial_masks
from gtp_fx.passes.exact.mark_tokens import mark_tokens
from gtp_fx.passes.exact.normalise import normalise
from gtp_fx.types.infer import TOKENS

N, C, HEADS = 12, 16, 2


class Block(nn.Module):
    """x + attention(x), with attention of one kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.qkv, self.patches = nn.Linear(C, 3 * C), nn.Conv2d(3, C, 2, 2)
        self.table = nn.Parameter(torch.randn(5, HEADS))
        self.register_buffer("entries", torch.arange(N * N).reshape(N, N) % 5)
        self.register_buffer("earlier", torch.full((N, N), -1e9).triu(1))

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        if self.kind == "patches":
            assert other is not None
            return self.attend(self.patches(other).flatten(2).transpose(1, 2)) + x.mean()
        if self.kind == "channels":
            return x + (x.transpose(1, 2) @ x).softmax(-1).matmul(x.transpose(1, 2)).transpose(1, 2)
        if self.kind == "batch":
            return x + self.attend(x.transpose(0, 1)).transpose(0, 1)
        return self.attend(x, other)

    def attend(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        B, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, tokens, 3, HEADS, C // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        learned = self.table[self.entries].permute(2, 0, 1)[None]
        if self.kind == "spelled":
            out = (q @ k.transpose(-2, -1) + learned).softmax(-1) @ v
        elif self.kind == "words, spelled":
            places = torch.arange(tokens)
            seen = (places[None, :] <= places[:, None]).expand(B, 1, tokens, tokens)
            out = (q @ k.transpose(-2, -1) + torch.where(seen, 0.0, -1e9)).softmax(-1) @ v
        elif self.kind == "empty, spelled":
            empty = (x.abs().sum(-1) > 0)[:, None, None, :]
            out = (q @ k.transpose(-2, -1) + torch.where(empty, 0.0, -1e9)).softmax(-1) @ v
        else:
            bias: dict[str, Any] = {
                "learned": {"attn_mask": learned},
                "all seen": {"attn_mask": torch.ones(tokens, tokens, dtype=torch.bool)},
                "causal": {"is_causal": True},
                "earlier": {"attn_mask": self.earlier},
                "learned, earlier": {"attn_mask": learned + self.earlier},
                "padding": {"attn_mask": None if other is None else other[:, None, None, :] > 0},
                "weighed": {"attn_mask": None if other is None else learned + other[:, None, None, :]},
            }
            out = F.scaled_dot_product_attention(q, k, v, **bias.get(self.kind, {}))
        return x + out.transpose(1, 2).reshape(B, tokens, C)


def marked(kind: str, prefix: int | None = None, *others: Tensor) -> Any:
    """The tokens that x is marked with; None where it isn't."""
    inputs = (torch.randn(3, N, C), *others)
    model = Block(kind).eval()
    gm = capture_module(model, call_signature(model, inputs))
    for step in (normalise, drop_trivial_masks):
        gm = step(gm)
        propagate_shapes(gm, after=step.__name__)
    x = next(iter(mark_tokens(gm, prefix).graph.find_nodes(op="placeholder")))
    return x.meta.get(TOKENS)


@pytest.mark.parametrize("kind", ["plain", "learned", "spelled", "all seen"])
def test_tokens_that_all_attend_to_all_are_tokens(kind: str) -> None:
    axis = marked(kind)
    assert (axis.prefix, axis.domain.grid.shape, axis.domain.grid.placed) == (5, (N - 5,), False)


def test_prefix_tokens_are_those_that_the_user_names() -> None:
    assert (marked("plain", 0).prefix, marked("plain", 1).domain.whole_count) == (0, N - 1)
    assert marked("plain", N - 1) is None, "one patch is none to remove"


@pytest.mark.parametrize(
    "kind", ["causal", "earlier", "learned, earlier", "words, spelled", "empty, spelled", "channels", "batch"]
)
def test_others_are_not(kind: str) -> None:
    assert marked(kind) is None


@pytest.mark.parametrize(
    ("kind", "other"),
    [("padding", torch.ones(3, N)), ("weighed", torch.ones(3, N)), ("patches", torch.randn(3, 3, 6, 8))],
)
def test_nor_beside_a_mask_or_patches(kind: str, other: Tensor) -> None:
    assert marked(kind, None, other) is None
