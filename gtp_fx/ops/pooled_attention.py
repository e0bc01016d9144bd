"""Attention with pooled keys, which scores its queries: SegFormer's, PVT's, Twins'."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gtp_fx.ops.attention import attention_map, over_heads
from gtp_fx.ops.autocast import without_autocast
from gtp_fx.ops.register import operator
from gtp_fx.ops.token_graph import coordinates


def _shapes(q, k, v, bias, scale, score, grid, cells):  # type: ignore[no-untyped-def]
    batch, heads, tokens, _ = q.shape
    return v.new_empty(batch, heads, tokens, v.shape[-1]), q.new_empty(batch, tokens, dtype=torch.float32)


@operator(_shapes)
def attention_with_cell_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float | None,
    score: str,
    grid: list[int],
    cells: list[int],
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention of every patch to pooled ones, which also scores each patch: low scores skip first.

    The method's two factors (arXiv 2311.03035, token selection) are what a token pays itself and what it receives.
    Where keys are pooled, a token's own cell takes its place: the factors are what it pays its cell, and what its cell
    receives.

    q: [B, H, N, D], the patches of `grid`.
    k, v: [B, H, M, D], one for each cell of the coarser grid.
    bias: additive, broadcasts to [B, H, N, M]; None for none.
    scale: factor of the logits; None for D**-0.5.
    score: a name in `SCORES` that doesn't read CLS.
    grid: the grid's sides in patches.
    cells: the coarser grid's sides, which divide those of `grid`.

    Returns the output [B, H, N, D] and the scores [B, N] in float32.
    """
    exp_BHNM, inverse_BHN1 = attention_map(q, k, bias, scale)
    out = torch.matmul(exp_BHNM.to(v.dtype), v) * inverse_BHN1.to(v.dtype)
    # A patch has no key of its own: where the scores need it, they read that of its cell.
    own_N = _cell_of(grid, cells, q.device)
    kind, _, how = score.partition("-")
    parts = []
    if kind in ("regenerate", "mixed"):
        index_BHN1 = own_N[:, None].expand(*exp_BHNM.shape[:3], 1)
        parts.append(over_heads((exp_BHNM.gather(-1, index_BHN1) * inverse_BHN1)[..., 0], how))
    if kind in ("broadcast", "mixed"):
        with without_autocast(exp_BHNM):
            received_BH1M = torch.matmul(inverse_BHN1.transpose(-2, -1), exp_BHNM)
        parts.append(over_heads(received_BH1M[:, :, 0], how).index_select(1, own_N))
    return out, math.prod(parts[1:], start=parts[0])


def _cell_of(grid: list[int], cells: list[int], device: torch.device) -> Tensor:
    """Return the cell that each patch lies in, [N]."""
    places_NR = coordinates(grid, device)
    index_N = torch.zeros(places_NR.shape[0], dtype=torch.int64, device=device)
    for side, (size, count) in enumerate(zip(grid, cells, strict=True)):
        index_N = index_N * count + places_NR[:, side].div(size // count, rounding_mode="floor")
    return index_N
