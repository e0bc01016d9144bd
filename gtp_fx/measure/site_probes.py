"""Probes of a site's work as it will run: GTP's operators, or the kernels that replace them on a GPU.

Each probe returns a function and its arguments, to be compiled and timed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.ops import gtp_fx, gtp_fx_kernels  # type: ignore[import-not-found]

from gtp_fx.kernels.available import has_kernels, load_kernels
from gtp_fx.kernels.stock_attention import stock_attention

Call = tuple[Any, ...]
"""A function, followed by its arguments."""

_NEIGHBORS, _ALPHA, _EPS = 8, 0.1, 1e-6


def scored_attention(q_BHND: Tensor) -> Call:
    """Return self-attention that also scores the patches. The first token is a prefix token.

    q_BHND: used as queries, keys and values.
    """
    _, _, tokens, head = q_BHND.shape
    if _load_kernels(q_BHND.device):
        kernel = stock_attention(q_BHND.device).choice(head, head, tokens, q_BHND.dtype, masked=False)
        if kernel is None:
            return lambda q: gtp_fx_kernels.attend(q, q, q, None, None, None, "mixed-max", 1, 0, []), q_BHND

        def scored(q: Tensor) -> tuple[Tensor, Tensor]:
            out, lse = gtp_fx.attention_with_lse(q, q, q, None, None, kernel)
            return out, gtp_fx_kernels.attention_scores(q, q, lse, None, "mixed-max", 1, 0, None)

        return scored, q_BHND
    return lambda q: gtp_fx.attention_with_scores(q, q, q, None, None, 1.0, "mixed-max", 1, 0), q_BHND


def similar_tokens(x_BNC: Tensor, grid: list[int]) -> Call:
    """Return the construction of a stream's mixed token graph. Only for a device that has kernels.

    x_BNC: patches without prefix tokens.
    grid: height and width in patches.
    """
    _load_kernels(x_BNC.device)
    return lambda x: gtp_fx_kernels.token_graph(x, grid, 0, "mixed", _NEIGHBORS), x_BNC


def selection(scores_BN: Tensor, removed: int) -> Call:
    """Return the selection of the `removed` tokens to remove from each image, by `scores_BN`."""
    if _load_kernels(scores_BN.device):
        return lambda s: gtp_fx_kernels.select(s, None, removed, s.shape[1]), scores_BN
    return lambda s: gtp_fx.select(s, removed), scores_BN


def propagation(x_BNC: Tensor, count: int, tile: Sequence[int] = ()) -> Call:
    """Return a site's work on the stream: add the attention's branch, propagate the removed tokens and normalise.

    `count` randomly chosen tokens are propagated along the mixed graph, together with the token scales. The function
    returns the shorter stream, its layer norm and its token scales.

    x_BNC: patches without prefix tokens.
    tile: the kernel's tile, or empty for the best known one.
    """
    batch, tokens = x_BNC.shape[:2]
    grid = _nearly_square(tokens)
    residual = torch.roll(x_BNC, 1, 1)
    near, degree = gtp_fx.token_graph(x_BNC, grid, 0, "mixed", min(_NEIGHBORS, tokens - 1))
    scores = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(0)).to(x_BNC.device)
    scales, weight, bias = torch.ones_like(scores), x_BNC[0, 0], x_BNC[0, 1]
    if not _load_kernels(x_BNC.device):
        kept, removed = gtp_fx.select(scores, count)
        weights = gtp_fx.propagation_weights(near, degree, kept, removed, grid, "mixed")

        def composite(x, r, w, k, g, s, weight, bias):  # type: ignore[no-untyped-def]
            shorter = gtp_fx.propagate(x + r, w, k, g, _ALPHA, 0)
            moved = gtp_fx.propagate(s[..., None], w, k, g, _ALPHA, 0)[..., 0]
            return shorter, F.layer_norm(shorter, shorter.shape[-1:], weight, bias, _EPS), moved

        return composite, x_BNC, residual, weights, kept, removed, scales, weight, bias
    *chosen, place = gtp_fx_kernels.select(scores, None, count, tokens)

    def kernels(x, r, s, weight, bias, *site):  # type: ignore[no-untyped-def]
        fixed = (s, weight, bias, grid, "mixed", _ALPHA, 0, _EPS, True, list(tile))
        shorter, moved, normed = gtp_fx_kernels.propagate(x, r, *site, *fixed)
        return shorter, normed, moved

    return kernels, x_BNC, residual, scales, weight, bias, near, degree, *chosen, place


def stream_pass(x_BNC: Tensor) -> Call:
    """Return the same place's work without a site: add the attention's branch and normalise the sum."""

    def add_and_norm(x, r, weight, bias):  # type: ignore[no-untyped-def]
        total = x + r
        return total, F.layer_norm(total, total.shape[-1:], weight, bias, _EPS)

    return add_and_norm, x_BNC, torch.roll(x_BNC, 1, 1), x_BNC[0, 0], x_BNC[0, 1]


def _nearly_square(cells: int) -> list[int]:
    """Return the height and width of the most nearly square grid with exactly `cells` cells."""
    side = max(side for side in range(1, math.isqrt(cells) + 1) if cells % side == 0)
    return [side, cells // side]


def _load_kernels(device: torch.device) -> bool:
    """Return whether `device` has kernels, and register them if so."""
    if not has_kernels(device):
        return False
    load_kernels()
    return True
