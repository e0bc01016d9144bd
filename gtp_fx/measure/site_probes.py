"""What a site does, as it will run: GTP's operators, or the kernels that take their places on a GPU.

Each returns a function and its arguments, to be compiled and timed.
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
"""A function, and what it is called with."""

_NEIGHBORS, _ALPHA, _EPS = 8, 0.1, 1e-6


def scored_attention(q_BHND: Tensor) -> Call:
    """Of one token before the patches, which are ranked."""
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
    """The graph that a stream begins with, mixed, over the patches alone: on a device that has kernels."""
    _load_kernels(x_BNC.device)
    return lambda x: gtp_fx_kernels.token_graph(x, grid, 0, "mixed", _NEIGHBORS), x_BNC


def selection(scores_BN: Tensor, leaving: int) -> Call:
    if _load_kernels(scores_BN.device):
        return lambda s: gtp_fx_kernels.select(s, None, leaving, s.shape[1]), scores_BN
    return lambda s: gtp_fx.select(s, leaving), scores_BN


def propagation(x_BNC: Tensor, leaving: int, tile: Sequence[int] = ()) -> Call:
    """What becomes of the stream at a site: the attention's branch is added, `leaving` tokens of all over the image are
    propagated along the mixed graph, with the tokens' scales, and the shorter stream is normalised.

    x_BNC: patches alone. tile: the kernel's, or none for the best that is known. The function returns the shorter
    stream, its norm and its token scales.
    """
    batch, tokens = x_BNC.shape[:2]
    grid = _nearly_square(tokens)
    residual = torch.roll(x_BNC, 1, 1)
    near, degree = gtp_fx.token_graph(x_BNC, grid, 0, "mixed", min(_NEIGHBORS, tokens - 1))
    scores = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(0)).to(x_BNC.device)
    scales, weight, bias = torch.ones_like(scores), x_BNC[0, 0], x_BNC[0, 1]
    if not _load_kernels(x_BNC.device):
        kept, gone = gtp_fx.select(scores, leaving)
        weights = gtp_fx.propagation_weights(near, degree, kept, gone, grid, "mixed")

        def composite(x, r, w, k, g, s, weight, bias):  # type: ignore[no-untyped-def]
            shorter = gtp_fx.propagate(x + r, w, k, g, _ALPHA, 0)
            moved = gtp_fx.propagate(s[..., None], w, k, g, _ALPHA, 0)[..., 0]
            return shorter, F.layer_norm(shorter, shorter.shape[-1:], weight, bias, _EPS), moved

        return composite, x_BNC, residual, weights, kept, gone, scales, weight, bias
    *chosen, place = gtp_fx_kernels.select(scores, None, leaving, tokens)

    def kernels(x, r, s, weight, bias, *site):  # type: ignore[no-untyped-def]
        told = (s, weight, bias, grid, "mixed", _ALPHA, 0, _EPS, True, list(tile))
        shorter, moved, normed = gtp_fx_kernels.propagate(x, r, *site, *told)
        return shorter, normed, moved

    return kernels, x_BNC, residual, scales, weight, bias, near, degree, *chosen, place


def stream_pass(x_BNC: Tensor) -> Call:
    """What the same place costs where no token leaves: the branch is added, and the sum normalised."""

    def add_and_norm(x, r, weight, bias):  # type: ignore[no-untyped-def]
        total = x + r
        return total, F.layer_norm(total, total.shape[-1:], weight, bias, _EPS)

    return add_and_norm, x_BNC, torch.roll(x_BNC, 1, 1), x_BNC[0, 0], x_BNC[0, 1]


def _nearly_square(cells: int) -> list[int]:
    """The sides of a grid of so many."""
    side = max(side for side in range(1, math.isqrt(cells) + 1) if cells % side == 0)
    return [side, cells // side]


def _load_kernels(device: torch.device) -> bool:
    """Whether `device` has kernels; they are registered then."""
    if not has_kernels(device):
        return False
    load_kernels()
    return True
