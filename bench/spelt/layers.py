"""Norms, linear layers, residuals and activations."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.spelt.sizes import CHANNELS, Part

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

# ---- residuals: the stream x and a branch's y


def _halves(x: Tensor) -> Tensor:
    """Return a half for each channel, wherever a layout has its channels; no other size is `CHANNELS`."""
    return torch.full([size if size == CHANNELS else 1 for size in x.shape], 0.5)


def _gated(x: Tensor, y: Tensor) -> Tensor:
    return x + _halves(x).tanh() * (y / math.tanh(0.5))


def _interpolated(x: Tensor, y: Tensor) -> Tensor:
    gate = _halves(x)
    return 2 * (x * (1 - gate) + gate * y)


RESIDUALS: Part = {
    "x + y": lambda x, y: x + y,
    "y + x": lambda x, y: y + x,
    "add": lambda x, y: torch.add(x, 2 * y, alpha=0.5),
    "in place": lambda x, y: y.add_(x),
    "x - -y": lambda x, y: x - (-y),
    "addcmul": lambda x, y: torch.addcmul(x, torch.ones(1), y),
    "lerp": lambda x, y: torch.lerp(2 * x, 2 * y, 0.5),
    "lerp, by difference": lambda x, y: 2 * (x + 0.5 * (y - x)),
    "gated by channel": _gated,
    "interpolated by channel": _interpolated,
    "stack, sum": lambda x, y: torch.stack([x, y]).sum(0),
    "x + 0 + y": lambda x, y: x + torch.zeros_like(x) + y,
    "x + 0 + y, a number": lambda x, y: x + 0 + (y - 0),
    "one stream of several": lambda x, y: (x.unsqueeze(2) + y.unsqueeze(2)).squeeze(2),
    "a factor by token": lambda x, y: x * torch.ones_like(x[..., :1]).exp().log() + y,
    "streams mixed": lambda x, y: (torch.stack([x, y], 2) * torch.ones(2, 1)).sum(2),
}

# ---- what is carried from one residual to the next: the sum, or all that is added up, [x, y, y, …]

CARRIED: Part = {
    "a sum": lambda carried: carried,
    "a list": lambda carried: functools.reduce(torch.add, carried),
    "a list, summed from 0": sum,
    "a list, stacked": lambda carried: torch.stack(carried).sum(0),
}

# ---- what attention and MLP, y and z, of one stream x are added to it by `add`, where both read that stream


def _halves_of(add: Any, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return 0.5 * add(x, 2 * y) + 0.5 * (x + 2 * z)


BRANCHES: Mapping[str, Callable[..., Tensor] | None] = {
    "in turn": None,
    "x + y + z": lambda add, x, y, z: add(add(x, y), z),
    "x + z + y": lambda add, x, y, z: add(add(x, z), y),
    "x + (y + z)": lambda add, x, y, z: add(x, y + z),
    "z + (y + x)": lambda add, x, y, z: z + add(x, y),
    "halves": _halves_of,
    "stacked": lambda add, x, y, z: add(x, torch.stack([z, y]).sum(dim=0)),
    "stacked with the stream": lambda add, x, y, z: torch.stack([y, x, z], -1).sum(-1),
    "a mean": lambda add, x, y, z: add(x, 2 * torch.stack([y, z]).mean(0)),
    "by a product": lambda add, x, y, z: add(x, torch.stack([y, z], -1) @ torch.ones(2)),
}
"""The first one is the usual block, in which the MLP reads the sum; the others are all of another model."""

# ---- activations

ACTIVATIONS: Part = {
    "gelu": F.gelu,
    "by erf": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "by erfc": lambda x: x * torch.special.ndtr(x),
}
