"""Attention that isn't softmax(q·kᵀ)·v alone: it stays spelled out, and tokens leave its block all the same.

The oracle is the method by hand in eager PyTorch, with token scales, on the same modules.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gtp_fx

from support.plain_vit import WIDTH, Block, PlainViT, built, images
from support.reference_stream import ALPHA, Stream

HEADS = 4
Maps = tuple[Tensor, Tensor]
"""What ranks tokens, and what values are multiplied by; each [B, H, N, N]."""


class Spelled(Block):
    """A block whose attention is written here: `kind` names a function of `KINDS`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.before, self.after = (nn.Parameter(torch.randn(HEADS, HEADS) * 0.3 + torch.eye(HEADS)) for _ in range(2))
        self.norm, self.mix = nn.LayerNorm(HEADS), nn.Conv2d(HEADS, HEADS, 1)
        self.gate, self.temperature = nn.Linear(WIDTH, HEADS), nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)

    def maps(self, x: Tensor, q: Tensor, k: Tensor, told: Tensor | float = 0.0) -> Maps:
        """told: log of the keys' token scales, [B, 1, 1, N]."""
        return KINDS[self.kind](self, x, q @ k.mT * 8**-0.5, told)

    def attention(self, x: Tensor, told: Tensor | float = 0.0) -> Maps:
        """Return the map that ranks tokens, and the output [B, N, C]."""
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        ranked, weights = self.maps(x, q, k, told)
        return ranked, self.out((weights @ v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))[1]
        return x + self.mlp(self.norm2(x))


def _told(weights: Tensor, told: Tensor | float) -> Tensor:
    return weights * told.exp() if isinstance(told, Tensor) else weights


def capped(self: Spelled, x: Tensor, logits: Tensor, told: Tensor | float) -> Maps:
    ranked = (5 * torch.tanh(logits / 5) + told).softmax(-1)
    return ranked, ranked


def clamped(self: Spelled, x: Tensor, logits: Tensor, told: Tensor | float) -> Maps:
    ranked = ((logits * self.temperature).clamp(-1, 1) + told).softmax(-1)
    return ranked, ranked


def talking(self: Spelled, x: Tensor, logits: Tensor, told: Tensor | float) -> Maps:
    ranked = (torch.einsum("bhij,hg->bgij", logits, self.before) + told).softmax(-1)
    return ranked, torch.einsum("bhij,hg->bgij", ranked, self.after)


def convolved(self: Spelled, x: Tensor, logits: Tensor, told: Tensor | float) -> Maps:
    ranked = (F.linear(logits.permute(0, 2, 3, 1), self.before).permute(0, 3, 1, 2) + told).softmax(-1)
    return ranked, self.mix(ranked)


def normed(self: Spelled, x: Tensor, logits: Tensor, told: Tensor | float) -> Maps:
    ranked = (logits + told).softmax(-1)
    mixed = torch.einsum("bhij,hg->bgij", ranked, self.after)
    return ranked, self.norm(mixed.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def gated(self: Spelled, x: Tensor, logits: Tensor, told: Tensor | float) -> Maps:
    ranked = (logits + told).softmax(-1)
    return ranked, ranked * self.gate(x).sigmoid().mT[..., None] + self.temperature * ranked.square()


def of_relu(self: Spelled, x: Tensor, logits: Tensor, told: Tensor | float) -> Maps:
    weights = logits.relu().square() / 37
    return weights, _told(weights, told)


def of_sigmoid_shares(self: Spelled, x: Tensor, logits: Tensor, told: Tensor | float) -> Maps:
    weights = logits.sigmoid()
    weights = weights / weights.sum(-1, keepdim=True)
    return weights, _told(weights, told)


KINDS: dict[str, Callable[[Spelled, Tensor, Tensor, Tensor | float], Maps]] = {
    "capped": capped,
    "clamped": clamped,
    "talking heads": talking,
    "heads convolved": convolved,
    "norm over heads": normed,
    "gated": gated,
    "relu": of_relu,
    "shares of sigmoids": of_sigmoid_shares,
}
EVERY_DAY = ("shares of sigmoids",)


def model(kind: str) -> PlainViT:
    return built(lambda: PlainViT(lambda: Spelled(kind)))  # type: ignore[return-value]


@torch.no_grad()
def by_hand(vit: PlainViT, schedule: tuple[int, ...]) -> Tensor:
    stream = Stream(vit.tokens(images(3)), (6, 6), 1)
    for block, count in zip(vit.blocks, schedule, strict=True):
        assert isinstance(block, Spelled)
        ranked, branch = block.attention(block.norm1(stream.x_BNC), stream.key_bias_BN[:, None, None, :])
        stream.x_BNC, stream.attn_BHNN = stream.x_BNC + branch, ranked
        stream.leave(count)
        stream.x_BNC = stream.x_BNC + block.mlp(block.norm2(stream.x_BNC))
    return vit.head(vit.norm(stream.x_BNC)[:, 0])


@torch.no_grad()
@pytest.mark.parametrize(
    "kind",
    [kind if kind in EVERY_DAY else pytest.param(kind, marks=pytest.mark.nightly) for kind in KINDS],
)
def test_tokens_leave_as_by_hand(kind: str) -> None:
    vit, given = model(kind), images(3)
    exact = gtp_fx.optimize(vit, flops_budget=1.0, example_inputs=images(2), compile=False)
    torch.testing.assert_close(exact(given), vit(given), rtol=1e-5, atol=1e-5)
    strategy = gtp_fx.GTP(alpha=ALPHA, token_scale=True)
    options = {"strategy": strategy, "schedule": [9, 7, 0], "example_inputs": images(2), "compile": False}
    fast = gtp_fx.optimize(vit, **options)
    assert [site.removed for site in fast.report.sites] == [9, 7]
    assert (fast(given) - vit(given)).abs().max() > 1e-3
    torch.testing.assert_close(fast(given), by_hand(vit, (9, 7, 0)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["tome", *(pytest.param(s, marks=pytest.mark.nightly) for s in ("topk", "ppt"))])
def test_other_strategies_read_its_keys_values_and_map(strategy: str) -> None:
    fast = gtp_fx.optimize(
        model("talking heads"), flops_budget=0.74, strategy=strategy, example_inputs=images(2), compile=False
    )
    assert fast.report.flops_ratio <= 0.74 and fast(images(3)).isfinite().all()


class Returned(Spelled):
    """A block that also keeps its map for the caller."""

    def forward(self, x: Tensor) -> Tensor:
        ranked, branch = self.attention(self.norm1(x))
        x = x + branch + ranked.mean((1, 2, 3))[:, None, None]
        return x + self.mlp(self.norm2(x))


def of_columns(self: Spelled, x: Tensor, logits: Tensor, told: Tensor | float) -> Maps:
    ranked = logits.softmax(-2)
    return ranked, ranked


def of_two(self: Spelled, x: Tensor, logits: Tensor, told: Tensor | float) -> Maps:
    ranked = logits.softmax(-1)
    return ranked, ranked @ ranked


@pytest.mark.parametrize(
    ("block", "written"), [(Returned, capped), (Spelled, of_columns), (Spelled, of_two)], ids=lambda part: part.__name__
)
def test_what_reads_a_map_otherwise_is_refused(
    block: type[Spelled], written: Callable[..., Maps], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KINDS, "here", written)
    with pytest.raises(gtp_fx.UnsupportedModelError):
        gtp_fx.optimize(
            built(lambda: PlainViT(lambda: block("here"))), flops_budget=0.74, example_inputs=images(2), compile=False
        )


def test_entries_of_its_map_are_not_dropped() -> None:
    with pytest.raises(gtp_fx.UnsupportedModelError, match="spelled out"):
        gtp_fx.optimize(
            model("capped"),
            flops_budget=0.74,
            strategy=gtp_fx.GTP(attention_sparsity=0.7),
            example_inputs=images(2),
            compile=False,
        )
