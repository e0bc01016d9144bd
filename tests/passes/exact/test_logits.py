"""Logits between q·kᵀ and the softmax, in every spelling that is fused attention; and what isn't, left alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.ops import aten

from gtp_fx.graph.verify import propagate_shapes
from gtp_fx.passes.exact.drop_trivial_masks import drop_trivial_masks
from gtp_fx.passes.exact.einsum_to_matmul import einsum_to_matmul
from gtp_fx.passes.exact.fuse_attention import fuse_attention
from gtp_fx.passes.exact.normalise import normalise

from support.graphs_by_hand import calls, traced

HEADS, ROWS, COLUMNS, FEATURES = 3, 2, 4, 5
TOKENS = ROWS * COLUMNS


def itself() -> Tensor:
    """True where a query is its own key."""
    return torch.arange(TOKENS)[:, None] == torch.arange(TOKENS)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


Q, K, V = (noise(2, HEADS, TOKENS, FEATURES, seed=n) for n in range(3))
BIAS, KEYS, HIDDEN = noise(HEADS, TOKENS, TOKENS), noise(FEATURES, TOKENS), noise(2, 1, TOKENS, TOKENS) > 0
NOTHING_SEEN = HIDDEN.clone()
NOTHING_SEEN[0, 0, 3] = True
Spelling = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def ends(function: Callable[..., Tensor]) -> Spelling:
    """Attention of logits that are a function of (q·kᵀ, q, bias, keys, hidden)."""
    return lambda q, k, v, bias, keys, hidden: function(q @ k.transpose(-2, -1), q, bias, keys, hidden).softmax(-1) @ v


def decomposed(logits: Tensor, q: Tensor, bias: Tensor, keys: Tensor, hidden: Tensor) -> Tensor:
    """A bias by row and one by column, of the queries, added where tokens are seen as rows and columns."""
    grid = q.reshape(-1, ROWS, COLUMNS, FEATURES)
    rows = torch.einsum("byxc,yck->byxk", grid, keys[None, :, :ROWS].expand(ROWS, -1, -1))
    columns = torch.einsum("byxc,xck->byxk", grid, keys[None, :, :COLUMNS].expand(COLUMNS, -1, -1))
    split = logits.reshape(-1, ROWS, COLUMNS, ROWS, COLUMNS) + rows[..., None] + columns[..., None, :]
    return split.reshape(2, HEADS, TOKENS, TOKENS)


def shares(logits: Tensor) -> Tensor:
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


FUSED: dict[str, Spelling] = {
    "scaled after a bias": ends(lambda x, q, b, keys, m: (x * 0.5 + b) * 0.7),
    "less a bias": ends(lambda x, q, b, keys, m: torch.sub(x, b, alpha=0.5)),
    "negated twice": ends(lambda x, q, b, keys, m: b - (-x)),
    "a temperature a head": ends(lambda x, q, b, keys, m: (x + b) / (1 + b[:, :1, :1].abs())),
    "a number added": ends(lambda x, q, b, keys, m: 3 - (-x - 2.0 - b) + 1),
    "a bias of queries": ends(lambda x, q, b, keys, m: q @ keys + x),
    "decomposed": ends(decomposed),
    "each hides itself": ends(lambda x, q, b, keys, m: x.masked_fill(itself(), -math.inf)),
    "hidden, then scaled": ends(lambda x, q, b, keys, m: x.masked_fill(itself(), -1e9) * 0.5 + b),
    "where it is seen": ends(lambda x, q, b, keys, m: torch.where(~itself(), x + b, -1e9)),
    "where it is hidden": ends(lambda x, q, b, keys, m: torch.where(m, torch.full_like(x, -1e9), x + b)),
    "an argument hides": ends(lambda x, q, b, keys, m: (x + b).masked_fill(m, -math.inf)),
    "an argument hides, finite": ends(lambda x, q, b, keys, m: (x * 0.3 + b).masked_fill(m, -1e6)),
    "two hide": ends(lambda x, q, b, keys, m: x.masked_fill(m, -1e9).masked_fill(itself(), -1e9)),
    "another type": lambda q, k, v, *_: torch.softmax(q @ k.transpose(-2, -1), -1, dtype=torch.float64).to(v.dtype) @ v,
    "values of another type": lambda q, k, v, *_: (
        torch.softmax(q.double() @ k.double().transpose(-2, -1), -1).to(v.dtype) @ v
    ),
    "shares": lambda q, k, v, *_: shares(q @ k.transpose(-2, -1)) @ v,
    "unshifted shares": lambda q, k, v, b, *_: (lambda e: (e / e.sum(-1, keepdim=True)) @ v)(
        (q @ k.transpose(-2, -1) + b).exp()
    ),
    "log_softmax": lambda q, k, v, *_: (q @ k.transpose(-2, -1)).log_softmax(-1).exp() @ v,
    "logsumexp": lambda q, k, v, b, *_: (lambda x: (x - x.logsumexp(-1, True)).exp() @ v)(q @ k.transpose(-2, -1) + b),
    "one key head": lambda q, k, v, *_: torch.einsum(
        "bhij,bjd->bhid", torch.einsum("bhid,bjd->bhij", q, k[:, 0]).softmax(-1), v[:, 0]
    ),
    "seen apart after the softmax": lambda q, k, v, *_: (
        (q @ k.transpose(-2, -1)).softmax(-1).reshape(-1, TOKENS, TOKENS) @ v.reshape(-1, TOKENS, FEATURES)
    ),
}


@pytest.mark.parametrize("hidden", [HIDDEN, NOTHING_SEEN], ids=["some hidden", "a row hidden"])
@pytest.mark.parametrize("spelling", FUSED)
def test_what_is_affine_in_the_product_is_fused_attention(spelling: str, hidden: Tensor) -> None:
    """Also where a row sees nothing: undefined where it is -inf, and the mean of all values where it is a number."""
    if hidden is NOTHING_SEEN and "hide" not in spelling and "hidden" not in spelling:
        pytest.skip("no mask")
    inputs = (Q, K, V, BIAS, KEYS, hidden)
    gm = einsum_to_matmul(normalise(traced(FUSED[spelling], *inputs)))
    propagate_shapes(gm, after="einsum_to_matmul")
    fused = fuse_attention(gm)
    propagate_shapes(fused, after="fuse_attention")
    assert calls(fused, aten.scaled_dot_product_attention.default) == 1
    assert not calls(fused, aten.softmax.int) + calls(fused, aten.exp.default)
    torch.testing.assert_close(fused(*inputs), FUSED[spelling](*inputs), equal_nan=True)


KEPT: dict[str, Spelling] = {
    "capped": ends(lambda x, q, b, keys, m: 5 * (x / 5).tanh()),
    "clamped": ends(lambda x, q, b, keys, m: x.clamp(-1, 1)),
    "filled with what isn't hidden": ends(lambda x, q, b, keys, m: x.masked_fill(m, -3.0)),
    "shown again": ends(lambda x, q, b, keys, m: x.masked_fill(itself(), -1e9) * -1),
    "scaled by key": ends(lambda x, q, b, keys, m: x * b[:, :1]),
    "heads mixed": ends(lambda x, q, b, keys, m: torch.einsum("bhij,hg->bgij", x, b[:, :3, 0])),
    "over all": lambda q, k, v, *_: (q @ k.transpose(-2, -1)).flatten(2).softmax(-1).unflatten(2, (TOKENS, TOKENS)) @ v,
    "over queries": lambda q, k, v, *_: (q @ k.transpose(-2, -1)).softmax(-2) @ v,
    "read twice": lambda q, k, v, *_: (lambda x: x.softmax(-1) @ v + x.mean())(q @ k.transpose(-2, -1)),
    "map read": lambda q, k, v, *_: (lambda w: w @ v + w.amax())(shares(q @ k.transpose(-2, -1))),
    "another sum": lambda q, k, v, *_: (lambda e: (e / e.sum(-2, keepdim=True)) @ v)((q @ k.transpose(-2, -1)).exp()),
    "added after an unknown mask": ends(lambda x, q, b, keys, m: x.masked_fill(m, -1e5) + 1e5 * b),
}


@pytest.mark.parametrize("spelling", KEPT)
def test_what_is_another_function_stays(spelling: str) -> None:
    inputs = (Q, K, V, BIAS, KEYS, NOTHING_SEEN)
    gm = normalise(traced(KEPT[spelling], *inputs))
    assert fuse_attention(gm) is gm


def test_a_mask_that_is_known_to_hide_nothing_is_gone() -> None:
    def spelled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
        logits = torch.where(
            hidden, -math.inf, torch.where(~hidden, (q @ k.transpose(-2, -1)).masked_fill(hidden, -1.0), 3.0)
        )
        return logits.softmax(-1) @ v

    fused = fuse_attention(drop_trivial_masks(normalise(traced(spelled, Q, K, V))))
    assert [n.target for n in fused.graph.nodes if n.op == "call_function"] == [
        aten.scaled_dot_product_attention.default
    ]
    torch.testing.assert_close(fused(Q, K, V), spelled(Q, K, V))
