"""Heads, attention, and heads joined again."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.spelt.sizes import CHANNELS, FEATURES, GRID, HEADS, TOKENS, Part

# ---- heads: x [B, N, C], linear layer's weight [3 C, C] and bias -> q, k, v, each [B, H, N, D]


def _joint_view(x: Tensor, linear: Any, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return linear(x, w, b).reshape(x.shape[0], TOKENS, 3, HEADS, FEATURES).permute(2, 0, 3, 1, 4).unbind(0)


def _split_heads(x: Tensor) -> Tensor:
    return x.view(x.shape[0], -1, HEADS, FEATURES).transpose(1, 2)


def _by_chunk(x: Tensor, linear: Any, w: Tensor, b: Tensor) -> list[Tensor]:
    return [t.unflatten(-1, (HEADS, -1)).swapaxes(1, 2) for t in linear(x, w, b).chunk(3, -1)]


def _separate(x: Tensor, linear: Any, w: Tensor, b: Tensor) -> list[Tensor]:
    return [_split_heads(linear(x, wi, bi)) for wi, bi in zip(w.chunk(3), b.chunk(3), strict=True)]


PROJECTIONS: Part = {
    "joint, view": _joint_view,
    "joint, chunk": _by_chunk,
    "joint, split": lambda x, linear, w, b: [_split_heads(t) for t in linear(x, w, b).split(CHANNELS, dim=2)],
    "joint, slices": lambda x, linear, w, b: (
        lambda y: [_split_heads(y.narrow(2, i * CHANNELS, CHANNELS)) for i in range(3)]
    )(linear(x, w, b)),
    "separate": _separate,
}

# ---- attention: q, k, v [B, H, N, D] -> [B, H, N, D]


def _merged(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    return [t.reshape(-1, TOKENS, FEATURES) for t in (q, k, v)]


def _by_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = _merged(q, k, v)
    return torch.bmm((torch.bmm(q, k.transpose(1, 2)) / math.sqrt(FEATURES)).softmax(-1), v).view(
        -1, HEADS, TOKENS, FEATURES
    )


def _by_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = _merged(q, k, v)
    empty = torch.zeros(1, TOKENS, TOKENS, dtype=q.dtype)
    logits = torch.baddbmm(empty, q, k.mT, beta=0, alpha=FEATURES**-0.5)
    return torch.bmm(logits.softmax(-1), v).unflatten(0, (-1, HEADS))


def _by_exponentials(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = (q * FEATURES**-0.5) @ k.mT
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    return (weights / weights.sum(-1, keepdim=True)) @ v


def _by_logsumexp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = q @ k.adjoint() * FEATURES**-0.5
    return torch.exp(logits - logits.logsumexp(-1, keepdim=True)) @ v


def _scaled_logits(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) * FEATURES**-0.5


def _masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    return _scaled_logits(q, k).masked_fill(hidden, float("-inf")).softmax(-1) @ v


def _where_seen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits, seen = _scaled_logits(q, k), torch.ones(q.shape[0], 1, 1, TOKENS, dtype=torch.bool)
    return torch.where(seen, logits, torch.full_like(logits, torch.finfo(logits.dtype).min)).softmax(-1) @ v


def _with_zeros(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = torch.ones(1, TOKENS)
    return (_scaled_logits(q, k) + (1.0 - seen[:, None, None, :]) * -10000.0).softmax(-1) @ v


def _added_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A bias of nothing, added to the logits between patches in place, seen by row and by column."""
    logits = _scaled_logits(q, k)
    apart = logits[:, :, 1:, 1:].view(q.shape[0], HEADS, GRID * GRID, GRID, GRID) + torch.zeros(HEADS, 1, GRID, 1)
    logits[:, :, 1:, 1:] = apart.flatten(3)
    return logits.softmax(-1) @ v


def _seen_apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = _scaled_logits(*_merged(q, k, v)[:2]).view(-1, 1, HEADS, TOKENS, TOKENS) + torch.zeros(1, 1, TOKENS, 1)
    return (logits.view(-1, TOKENS, TOKENS).softmax(-1) @ _merged(q, k, v)[2]).view(-1, HEADS, TOKENS, FEATURES)


def _one_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.unsqueeze(1) for t in (q, k, v))
    return (_scaled_logits(q, k).softmax(-1) @ v).squeeze(1)


def _in_groups(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.unflatten(1, (HEADS, 1)).transpose(1, 2) for t in (q, k, v))
    return (_scaled_logits(q, k).softmax(-1) @ v).transpose(1, 2).flatten(1, 2)


def _values_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (v.mT @ _scaled_logits(q, k).softmax(-1).mT).mT


def _along_columns(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (v.mT @ (k @ q.mT * FEATURES**-0.5).softmax(-2)).mT


def _einsum_in_groups(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.unflatten(1, (1, HEADS)) for t in (q, k, v))
    weights = torch.softmax(torch.einsum("bghqd,bghkd->bghqk", q, k) * FEATURES**-0.5, -1)
    return torch.einsum("bghqk,bghkd->bghqd", weights, v).flatten(1, 2)


ATTENTIONS: Part = {
    "sdpa": F.scaled_dot_product_attention,
    "sdpa, scaled before": lambda q, k, v: F.scaled_dot_product_attention(q * FEATURES**-0.5, k, v, scale=1.0),
    "sdpa, merged": lambda q, k, v: F.scaled_dot_product_attention(*_merged(q, k, v)).unflatten(0, (-1, HEADS)),
    "matmul": lambda q, k, v: ((q * FEATURES**-0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v,
    "matmul, scaled after": lambda q, k, v: torch.matmul(F.softmax(q.matmul(k.mT).mul(FEATURES**-0.5), -1), v),
    "matmul, keys scaled": lambda q, k, v: torch.softmax(q @ (k.mT / math.sqrt(FEATURES)), -1) @ v,
    "in float32": lambda q, k, v: F.softmax(q @ k.mT * FEATURES**-0.5, dim=-1, dtype=torch.float32).type_as(v) @ v,
    "einsum": lambda q, k, v: torch.einsum(
        "bhij,bhjd->bhid", (torch.einsum("bhid,bhjd->bhij", q, k) * FEATURES**-0.5).softmax(-1), v
    ),
    "einsum, ellipsis": lambda q, k, v: torch.einsum(
        "...ij,...jd->...id", torch.softmax(torch.einsum("...id,...jd->...ij", q, k) / math.sqrt(FEATURES), -1), v
    ),
    "bmm": _by_bmm,
    "baddbmm": _by_baddbmm,
    "exponentials": _by_exponentials,
    "logsumexp": _by_logsumexp,
    "log_softmax": lambda q, k, v: torch.exp(F.log_softmax(_scaled_logits(q, k), -1)) @ v,
    "masked_fill": _masked,
    "where": _where_seen,
    "additive mask": _with_zeros,
    "a number added": lambda q, k, v: torch.softmax(3 - -_scaled_logits(q, k) + 1, -1) @ v,
    "seen apart": _seen_apart,
    "added in place": _added_in_place,
    "one window": _one_window,
    "heads in groups": _in_groups,
    "einsum in groups": _einsum_in_groups,
    "einsum, values first": lambda q, k, v: torch.einsum("bhjd,bhij->bhid", v, _scaled_logits(q, k).softmax(-1)),
    "values first": _values_first,
    "along columns": _along_columns,
}

# ---- heads joined again: [B, H, N, D] -> [B, N, C]

JOININGS: Part = {
    "transpose, reshape": lambda x: x.transpose(1, 2).reshape(x.shape[0], -1, CHANNELS),
    "permute, flatten": lambda x: x.permute(0, 2, 1, 3).contiguous().flatten(-2),
    "movedim": lambda x: x.movedim(1, 2).flatten(2),
    "cat of heads": lambda x: torch.cat(x.unbind(1), -1),
}
