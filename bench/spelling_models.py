"""One plain ViT whose every part can be written in many ways: the same parameters, the same numbers, another graph.

    B images, N tokens, C channels, H heads, D features of a head, P = side * side pixels of a patch

A part is a dictionary from a spelling's name to a function; `Respelt` calls the functions that a `Spelling` names. The
first spelling of every part is the canonical one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE, GRID, CHANNELS, HEADS, DEPTH = 4, 6, 24, 3, 4
TOKENS, FEATURES = GRID * GRID + 1, CHANNELS // HEADS

Part = Mapping[str, Callable[..., Any]]


# ---- patches: images [B, 3, GRID * SIDE, GRID * SIDE], weight [C, 3, SIDE, SIDE], bias [C] -> [B, GRID * GRID, C]


def _by_view(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    x = x.reshape(-1, 3, GRID, SIDE, GRID, SIDE).permute(0, 2, 4, 1, 3, 5)
    return F.linear(x.reshape(x.shape[0], GRID * GRID, -1), w.flatten(1), b)


def _by_tensor_unfold(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    x = x.unfold(2, SIDE, SIDE).unfold(3, SIDE, SIDE)
    return F.linear(x.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2), w.flatten(1), b)


def _by_pixel_unshuffle(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.conv2d(F.pixel_unshuffle(x, SIDE), w.reshape(CHANNELS, -1, 1, 1), b).flatten(2).mT


PATCHES: Part = {
    "conv2d": lambda x, w, b: F.conv2d(x, w, b, stride=SIDE).flatten(2).transpose(1, 2),
    "conv2d, movedim": lambda x, w, b: F.conv2d(x, w, b, stride=SIDE).movedim(1, -1).flatten(1, 2),
    "conv2d, permute, reshape": lambda x, w, b: (
        F.conv2d(x, w, b, SIDE).permute(0, 2, 3, 1).reshape(x.shape[0], -1, CHANNELS)
    ),
    "F.unfold": lambda x, w, b: F.linear(F.unfold(x, SIDE, stride=SIDE).mT, w.flatten(1), b),
    "view": _by_view,
    "Tensor.unfold": _by_tensor_unfold,
    "pixel_unshuffle": _by_pixel_unshuffle,
}

# ---- tokens: patches [B, N - 1, C], cls [1, 1, C], position [1, N, C] -> [B, N, C]

ORDER = tuple(torch.randperm(GRID * GRID, generator=torch.Generator().manual_seed(0)).tolist())
"""The patches in another order."""


def _in_order(x: Tensor, cls: Tensor, pos: Tensor, arranged: Callable[[Tensor], Tensor]) -> Tensor:
    """Tokens whose patches, positions added, are arranged anew."""
    return torch.cat([(cls + pos[:, :1]).expand(x.shape[0], -1, -1), arranged(x + pos[:, 1:])], 1)


def _as_map(x: Tensor) -> Tensor:
    return x.unflatten(1, (GRID, GRID))


def _in_blocks(x: Tensor) -> Tensor:
    half = GRID // 2
    return x.view(-1, half, 2, half, 2, CHANNELS).transpose(2, 3).reshape(x.shape)


def _gathered(x: Tensor) -> Tensor:
    numbers = torch.tensor(ORDER).expand(x.shape[0], -1)
    return torch.gather(x, 1, numbers.unsqueeze(-1).repeat(1, 1, CHANNELS))


def _by_rows(x: Tensor) -> Tensor:
    return x[torch.arange(x.shape[0])[:, None], torch.tensor(ORDER).expand(x.shape[0], -1)]


ARRANGED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "column by column": lambda x: _as_map(x).transpose(1, 2).flatten(1, 2),
    "in blocks of 2 x 2": _in_blocks,
    "rolled": lambda x: _as_map(x).roll((1, 2), (1, 2)).flatten(1, 2),
    "backward": lambda x: x.flip(1),
    "mirrored and rolled": lambda x: _as_map(x).flip(2).roll(2, 2).flatten(1, 2),
    "by numbers": lambda x: x[:, torch.tensor(ORDER)],
    "index_select": lambda x: x.index_select(1, torch.tensor(ORDER)),
    "gathered": _gathered,
    "by rows and numbers": _by_rows,
}
"""Other orders of the patches [B, GRID * GRID, C], all of which have the neighbours that the canonical order has."""

TOKENS_OF: Part = {
    "cat": lambda x, cls, pos: torch.cat([cls.expand(x.shape[0], -1, -1), x], 1) + pos,
    "concat, repeat": lambda x, cls, pos: torch.concat([cls.repeat(x.shape[0], 1, 1), x], dim=1).add_(pos),
    "hstack": lambda x, cls, pos: pos + torch.hstack([cls.expand(len(x), 1, CHANNELS), x]),
    "apart": lambda x, cls, pos: torch.cat([(cls + pos[:, :1]).expand(x.size(0), -1, -1), x + pos[:, 1:]], 1),
    "looked up": lambda x, cls, pos: (
        torch.cat([cls.expand(x.shape[0], -1, -1), x], 1) + F.embedding(torch.arange(TOKENS), pos[0])
    ),
    **{name: functools.partial(_in_order, arranged=arranged) for name, arranged in ARRANGED.items()},
}

# ---- norms: x [..., C], weight [C], bias [C]


def _norm_by_hand(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5) * w + b


def _norm_by_moments(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return torch.addcmul(b, w, (x - mean) / torch.sqrt(variance + 1e-5))


NORMS: Part = {
    "layer_norm": lambda x, w, b: F.layer_norm(x, (CHANNELS,), w, b),
    "native": lambda x, w, b: torch.native_layer_norm(x, [CHANNELS], w, b, 1e-5)[0],
    "by hand": _norm_by_hand,
    "by moments": _norm_by_moments,
}

# ---- linear layers: x [B, N, C], weight [out, C], bias [out]

LINEARS: Part = {
    "linear": F.linear,
    "matmul": lambda x, w, b: x @ w.T + b,
    "mT": lambda x, w, b: torch.matmul(x, w.mT).add(b),
    "einsum": lambda x, w, b: torch.einsum("bnc,oc->bno", x, w) + b,
    "einsum, ellipsis": lambda x, w, b: torch.einsum("...c,oc->...o", x, w) + b,
    "addmm": lambda x, w, b: torch.addmm(b, x.reshape(-1, x.shape[-1]), w.t()).view(*x.shape[:-1], -1),
    "tensordot": lambda x, w, b: torch.tensordot(x, w, dims=([-1], [1])) + b,
    "conv1d": lambda x, w, b: F.conv1d(x.mT, w[:, :, None], b).mT,
}

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
}

# ---- heads joined again: [B, H, N, D] -> [B, N, C]

JOININGS: Part = {
    "transpose, reshape": lambda x: x.transpose(1, 2).reshape(x.shape[0], -1, CHANNELS),
    "permute, flatten": lambda x: x.permute(0, 2, 1, 3).contiguous().flatten(-2),
    "movedim": lambda x: x.movedim(1, 2).flatten(2),
    "cat of heads": lambda x: torch.cat(x.unbind(1), -1),
}

# ---- residuals: the stream x and a branch's y

RESIDUALS: Part = {
    "x + y": lambda x, y: x + y,
    "y + x": lambda x, y: y + x,
    "add": lambda x, y: torch.add(x, 2 * y, alpha=0.5),
    "in place": lambda x, y: y.add_(x),
    "x - -y": lambda x, y: x - (-y),
    "addcmul": lambda x, y: torch.addcmul(x, torch.ones(1), y),
    "lerp": lambda x, y: torch.lerp(2 * x, 2 * y, 0.5),
    "lerp, by difference": lambda x, y: 2 * (x + 0.5 * (y - x)),
    "stack, sum": lambda x, y: torch.stack([x, y]).sum(0),
    "x + 0 + y": lambda x, y: x + torch.zeros_like(x) + y,
    "x + 0 + y, a number": lambda x, y: x + 0 + (y - 0),
    "one stream of several": lambda x, y: (x.unsqueeze(2) + y.unsqueeze(2)).squeeze(2),
    "a factor by token": lambda x, y: x * torch.ones_like(x[..., :1]).exp().log() + y,
    "streams mixed": lambda x, y: (torch.stack([x, y], 2) * torch.ones(2, 1)).sum(2),
}

# ---- activations

ACTIVATIONS: Part = {
    "gelu": F.gelu,
    "by erf": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "by erfc": lambda x: x * torch.special.ndtr(x),
}

# ---- the stream's layout within the blocks: there, and back, and the block where all of it works in that layout


def _tokens_first(block: Block, x: Tensor) -> Tensor:
    """[N, B, C], with the attention of nn.MultiheadAttention."""
    y = block.norm1(x)
    q_and_more = (CHANNELS, HEADS, block.qkv.weight, block.qkv.bias, None, None, False, 0.0)
    attended, _ = F.multi_head_attention_forward(
        y, y, y, *q_and_more, block.out.weight, block.out.bias, training=False, need_weights=False
    )
    x = RESIDUALS[block.spelling.residual](x, attended)
    y = block.down(ACTIVATIONS[block.spelling.activation](block.up(block.norm2(x))))
    return RESIDUALS[block.spelling.residual](x, y)


def _tokens_first_by_heads(block: Block, x: Tensor) -> Tensor:
    """[N, B, C], with attention over [N, B, H, D] by einsum."""
    count, batch, _ = x.shape
    q, k, v = block.qkv(block.norm1(x)).reshape(count, batch, 3, HEADS, FEATURES).unbind(2)
    weights = torch.einsum("ibhd,jbhd->bhij", q, k * FEATURES**-0.5).softmax(-1)
    attended = torch.einsum("bhij,jbhd->ibhd", weights, v).reshape(count, batch, CHANNELS)
    x = RESIDUALS[block.spelling.residual](x, block.out(attended))
    y = block.down(ACTIVATIONS[block.spelling.activation](block.up(block.norm2(x))))
    return RESIDUALS[block.spelling.residual](x, y)


def _tokens_last(block: Block, x: Tensor) -> Tensor:
    """[B, C, N], with convolutions for linear layers."""

    def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        scale = torch.rsqrt(centred.square().mean(1, keepdim=True) + 1e-5)
        return centred * scale * layer.weight[:, None] + layer.bias[:, None]

    def through(layer: nn.Linear, x: Tensor) -> Tensor:
        return F.conv1d(x, layer.weight[:, :, None], layer.bias)

    y = norm(block.norm1, x)
    weights, biases = block.qkv.weight.chunk(3), block.qkv.bias.chunk(3)
    each = [F.conv1d(y, weight[..., None], bias) for weight, bias in zip(weights, biases, strict=True)]
    q, k, v = (t.unflatten(1, (HEADS, FEATURES)) for t in each)
    attended = F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT
    x = RESIDUALS[block.spelling.residual](x, through(block.out, attended.flatten(1, 2)))
    y = through(block.down, ACTIVATIONS[block.spelling.activation](through(block.up, norm(block.norm2, x))))
    return RESIDUALS[block.spelling.residual](x, y)


Turn = Callable[[Tensor], Tensor]
LAYOUTS: Mapping[str, tuple[Turn, Turn, Callable[[Block, Tensor], Tensor] | None]] = {
    "[B, N, C]": (lambda x: x, lambda x: x, None),
    "[N, B, C]": (lambda x: x.transpose(0, 1), lambda x: x.transpose(0, 1), None),
    "[B, C, N]": (lambda x: x.mT, lambda x: x.mT, None),
    "[N, B, C], whole block": (lambda x: x.transpose(0, 1), lambda x: x.transpose(0, 1), _tokens_first),
    "[N, B, C], einsum": (lambda x: x.permute(1, 0, 2), lambda x: x.permute(1, 0, 2), _tokens_first_by_heads),
    "[B, C, N], whole block": (lambda x: x.mT, lambda x: x.mT, _tokens_last),
}

# ---- what the head reads: [B, N, C] -> [B, C]

POOLS: Part = {
    "x[:, 0]": lambda x: x[:, 0],
    "narrow": lambda x: x.narrow(1, 0, 1).squeeze(1),
    "split": lambda x: x.split([1, TOKENS - 1], 1)[0].flatten(1),
    "tensor_split": lambda x: torch.tensor_split(x, [1], dim=1)[0][:, 0],
    "unbind": lambda x: x.unbind(1)[0],
}


@dataclass(frozen=True)
class Spelling:
    """The way in which each part is written; the default is the canonical one."""

    patches: str = next(iter(PATCHES))
    tokens: str = next(iter(TOKENS_OF))
    norm: str = next(iter(NORMS))
    linear: str = next(iter(LINEARS))
    projection: str = next(iter(PROJECTIONS))
    attention: str = next(iter(ATTENTIONS))
    joining: str = next(iter(JOININGS))
    residual: str = next(iter(RESIDUALS))
    activation: str = next(iter(ACTIVATIONS))
    layout: str = next(iter(LAYOUTS))
    pool: str = next(iter(POOLS))


CHOICES: Mapping[str, tuple[str, ...]] = dict(
    zip(
        [field.name for field in fields(Spelling)],
        map(
            tuple,
            (
                PATCHES,
                TOKENS_OF,
                NORMS,
                LINEARS,
                PROJECTIONS,
                ATTENTIONS,
                JOININGS,
                RESIDUALS,
                ACTIVATIONS,
                LAYOUTS,
                POOLS,
            ),
        ),
        strict=True,
    )
)
"""The spellings of each part."""


class Block(nn.Module):
    """Pre-norm attention and MLP. `spelling` may be changed at any time: the parameters serve all."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.spelling = spelling
        self.norm1, self.norm2 = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.qkv, self.out = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.up, self.down = nn.Linear(CHANNELS, 4 * CHANNELS), nn.Linear(4 * CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        how = self.spelling
        (there, back, whole), linear, add = LAYOUTS[how.layout], LINEARS[how.linear], RESIDUALS[how.residual]
        if whole is not None:
            return whole(self, x)

        def norm(layer: nn.LayerNorm) -> Tensor:
            return NORMS[how.norm](back(x), layer.weight, layer.bias)

        def through(layer: nn.Linear, y: Tensor) -> Tensor:
            return linear(y, layer.weight, layer.bias)

        q, k, v = PROJECTIONS[how.projection](norm(self.norm1), linear, self.qkv.weight, self.qkv.bias)
        attended = JOININGS[how.joining](ATTENTIONS[how.attention](q, k, v))
        x = add(x, there(through(self.out, attended)))
        return add(x, there(through(self.down, ACTIVATIONS[how.activation](through(self.up, norm(self.norm2))))))


class Respelt(nn.Module):
    """The ViT: images [B, 3, GRID * SIDE, GRID * SIDE] -> logits [B, 10]."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.spelling = spelling
        self.patch = nn.Conv2d(3, CHANNELS, SIDE, SIDE)
        self.cls, self.position = (
            nn.Parameter(torch.zeros(1, 1, CHANNELS)),
            nn.Parameter(torch.zeros(1, TOKENS, CHANNELS)),
        )
        self.blocks = nn.ModuleList([Block(spelling) for _ in range(DEPTH)])
        self.norm, self.head = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, 10)

    def forward(self, images: Tensor) -> Tensor:
        how = self.spelling
        there, back, _ = LAYOUTS[how.layout]
        x = PATCHES[how.patches](images, self.patch.weight, self.patch.bias)
        x = there(TOKENS_OF[how.tokens](x, self.cls, self.position))
        for block in self.blocks:
            x = block(x)
        x = NORMS[how.norm](back(x), self.norm.weight, self.norm.bias)
        return self.head(POOLS[how.pool](x))
