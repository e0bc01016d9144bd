"""Selection in one launch: which tokens are kept, which are removed (arXiv 2311.03035, token selection).

Nothing is sorted. A program holds one image's scores as integers of the same order and finds the least score that is
kept, bit by bit from the highest: 32 counts. Running sums then give each token's position, so all lists are ascending.

The kernel works on the cells of the whole grid instead of the remaining tokens. Both have the same order, so the same
launch also returns where on the grid the tokens are, and a map of it: `place`, [B, G] int32, for each cell

    0 or more    its patch is kept, and has this index among the kept ones
    -1           its patch was removed at an earlier site
    -2 - i       its patch is removed at this site, and had index i before it

With that map `propagate` reads a neighbour's index instead of searching for it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gtp_fx.kernels.launch import launcher
from gtp_fx.kernels.tiles import power_of_two
from gtp_fx.ops.register import shaped

MOST_CELLS = 16_384
"""Largest grid: a program holds an image's scores in registers."""

_LEAST, _GREATEST = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)


@triton.jit
def select_kernel(  # type: ignore[no-untyped-def]
    score_ptr, before_ptr, kept_ptr, removed_ptr, kept_cell_ptr, removed_cell_ptr, place_ptr,
    cells, tokens, stay, image_stride, token_stride, WHOLE: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """Select the tokens of one image.

    score: [B, tokens] float32.
    before: the map of the site before, [B, cells]; not read where WHOLE, since each cell then has its token.
    kept, kept_cell: the kept tokens and their cells, [B, stay].
    removed, removed_cell: the removed tokens and their cells, [B, tokens - stay].
    place: the map of this site, [B, cells].
    """
    image = tl.program_id(0).to(tl.int64)
    cell = tl.arange(0, CELLS)
    inside = cell < cells
    # The token in each cell; negative where it was removed before.
    token = cell if WHOLE else tl.load(before_ptr + image * cells + cell, mask=inside, other=-1)
    present = inside & (token >= 0)
    score = tl.load(score_ptr + image * image_stride + token * token_stride, mask=present, other=0.0)
    # A float's bits order as integers do once those of negatives are inverted; adding 0 makes -0 and 0 the same.
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    rank = tl.where(bits < 0, bits ^ _GREATEST, bits)
    rank = tl.where(score != score, _GREATEST, rank)  # NaN is above all, as in torch's sort
    rank = tl.where(present, rank, _LEAST)
    # The greatest integer that at least `stay` ranks reach.
    reached = tl.sum((rank >= 0).to(tl.int32))
    least = tl.where(reached >= stay, 0, _LEAST)
    for bit in range(31):
        higher = least + (1 << (30 - bit))
        reached = tl.sum((rank >= higher).to(tl.int32))
        least = tl.where(reached >= stay, higher, least)
    above = (rank > least) & present
    level = (rank == least) & present
    admitted = stay - tl.sum(above.to(tl.int32))  # the first of those of exactly that score
    kept = above | (level & (tl.cumsum(level.to(tl.int32), 0) <= admitted))
    goes = present & (kept == 0)
    # A token's position in its list is the number of such tokens before it.
    stays_at = tl.cumsum(kept.to(tl.int32), 0) - 1
    goes_at = tl.cumsum(goes.to(tl.int32), 0) - 1
    tl.store(kept_ptr + image * stay + stays_at, token.to(tl.int64), mask=kept)
    tl.store(kept_cell_ptr + image * stay + stays_at, cell.to(tl.int64), mask=kept)
    removed = tokens - stay
    tl.store(removed_ptr + image * removed + goes_at, token.to(tl.int64), mask=goes)
    tl.store(removed_cell_ptr + image * removed + goes_at, cell.to(tl.int64), mask=goes)
    place = tl.where(kept, stays_at, tl.where(goes, -2 - token, -1))
    tl.store(place_ptr + image * cells + cell, place, mask=inside)


def _shapes(score_BN, before_BG, propagated, cells):  # type: ignore[no-untyped-def]
    batch, tokens = score_BN.shape
    kept, removed = (score_BN.new_empty(batch, n, dtype=torch.int64) for n in (tokens - propagated, propagated))
    place_BG = score_BN.new_empty(batch, cells, dtype=torch.int32)
    return kept, removed, torch.empty_like(kept), torch.empty_like(removed), place_BG


@shaped("select", _shapes)
@torch.library.triton_op("gtp_fx_kernels::select", mutates_args={})
def select(
    score_BN: Tensor, before_BG: Tensor | None, propagated: int, cells: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the same indices as `torch.ops.gtp_fx.select`, and where these tokens are on the grid.

    score_BN: [B, n] float32, any strides.
    before_BG: the map of the site before, or None while all n = `cells` tokens are present.
    propagated: P, how many tokens are removed.
    cells: G, the whole grid's patches, at most `MOST_CELLS`.

    Returns the kept [B, n - P] and the removed [B, P] as indices into the n tokens, both as indices into the cells, and
    the map [B, G] of the module's docstring.
    """
    batch, tokens = score_BN.shape
    kept_BK, kept_cell_BK = (score_BN.new_empty(batch, tokens - propagated, dtype=torch.int64) for _ in range(2))
    removed_BP, removed_cell_BP = (score_BN.new_empty(batch, propagated, dtype=torch.int64) for _ in range(2))
    place_BG = score_BN.new_empty(batch, cells, dtype=torch.int32)
    block = power_of_two(cells)
    launcher(select_kernel)[(batch,)](
        score_BN, place_BG if before_BG is None else before_BG,
        kept_BK, removed_BP, kept_cell_BK, removed_cell_BP, place_BG,
        cells, tokens, tokens - propagated, *score_BN.stride(),
        WHOLE=before_BG is None, CELLS=block, num_warps=min(max(block // 512, 1), 8),
    )  # fmt: skip
    return kept_BK, removed_BP, kept_cell_BK, removed_cell_BP, place_BG
