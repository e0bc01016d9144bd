"""How tokens are made of an image, and what the head reads of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.spelt.sizes import CHANNELS, GRID, SIDE, TOKENS, Part

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

# ---- what the head reads: [B, N, C] -> [B, C]

POOLS: Part = {
    "x[:, 0]": lambda x: x[:, 0],
    "narrow": lambda x: x.narrow(1, 0, 1).squeeze(1),
    "split": lambda x: x.split([1, TOKENS - 1], 1)[0].flatten(1),
    "tensor_split": lambda x: torch.tensor_split(x, [1], dim=1)[0][:, 0],
    "unbind": lambda x: x.unbind(1)[0],
}
