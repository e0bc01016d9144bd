"""What a site does, as it will run: GTP's operators, or the kernels that take their places on a GPU.

Each returns a function and its arguments, to be compiled and timed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.ops import gtp_fx, gtp_fx_kernels  # type: ignore[import-not-found]

from gtp_fx.kernels.available import has_kernels, load_kernels

Call = tuple[Any, ...]
"""A function, and what it is called with."""


def scored_attention(q_BHND: Tensor) -> Call:
    """Of one token before the patches, which are ranked."""
    if _load_kernels(q_BHND.device):
        return lambda q: gtp_fx_kernels.attend(q, q, q, None, None, None, None, "mixed-max", 1, 0, []), q_BHND
    return lambda q: gtp_fx.attention_with_scores(q, q, q, None, None, 1.0, "mixed-max", 1, 0), q_BHND


def selection(scores_BN: Tensor, leaving: int) -> Call:
    if _load_kernels(scores_BN.device):
        return lambda s: gtp_fx_kernels.select(s, None, leaving, s.shape[1]), scores_BN
    return lambda s: gtp_fx.select(s, leaving), scores_BN


def propagation(x_BNC: Tensor, leaving: int) -> Call:
    """Of the last tokens, on a graph in which each has a few neighbours, as the spatial one has."""
    batch, tokens, _ = x_BNC.shape
    kept, gone = (
        part.expand(batch, -1).contiguous()
        for part in torch.arange(tokens, device=x_BNC.device).split([tokens - leaving, leaving])
    )
    near, degree = gtp_fx.token_graph(x_BNC, [tokens], 0, "spatial", 1)
    if not _load_kernels(x_BNC.device):
        weights = gtp_fx.propagation_weights(near, degree, kept, gone, [tokens], "spatial")
        return lambda x, w, k, g: gtp_fx.propagate(x, w, k, g, 0.1, 0), x_BNC, weights, kept, gone
    place = torch.cat([kept, -2 - gone], dim=1).int()
    told: Call = (None, None, None, [tokens], "spatial", 0.1, 0, -1.0, False, [])
    indices = (kept, gone, kept, gone, place)
    return lambda x, n, d, *i: gtp_fx_kernels.propagate(x, None, n, d, *i, *told), x_BNC, near, degree, *indices


def _load_kernels(device: torch.device) -> bool:
    """Whether `device` has kernels; they are registered then."""
    if not has_kernels(device):
        return False
    load_kernels()
    return True
