"""Selection in one launch: which tokens stay, which are propagated (arXiv 2311.03035, token selection).

Nothing is sorted. A program holds one image's scores as integers of the same order and finds the least score that stays,
bit by bit from the highest: 32 counts. Running sums then say where each token goes, so all lists come out ascending.

It works on the cells of the whole grid and not on the tokens that are left. Both have the same order, and so one launch also
says where on the grid they stand, and leaves a map of it: `place`, [B, G] int32, for each cell

    0 or more    its patch is left: which one it is among those that are
    -1           it left at an earlier site
    -2 - i       it leaves here, and was the i-th

By that map `propagate` finds neighbours without looking for them.
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
"""An image's scores are held in registers."""

_LEAST, _GREATEST = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)


@triton.jit
def select_kernel(  # type: ignore[no-untyped-def]
    score_ptr, before_ptr, kept_ptr, leaving_ptr, kept_cell_ptr, leaving_cell_ptr, place_ptr,
    cells, tokens, stay, image_stride, token_stride, WHOLE: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """One image: score [tokens] float32, before [cells] -> kept, kept_cell [stay], leaving, leaving_cell, place [cells]."""
    image = tl.program_id(0).to(tl.int64)
    cell = tl.arange(0, CELLS)
    inside = cell < cells
    # Which token stands in a cell; with none left in it, no other.
    token = cell if WHOLE else tl.load(before_ptr + image * cells + cell, mask=inside, other=-1)
    present = inside & (token >= 0)
    score = tl.load(score_ptr + image * image_stride + token * token_stride, mask=present, other=0.0)
    # A float's bits order as integers do once a negative's are turned round; adding 0 makes one zero of two.
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
    admitted = stay - tl.sum(above.to(tl.int32))  # of those on the level, the first in order
    kept = above | (level & (tl.cumsum(level.to(tl.int32), 0) <= admitted))
    goes = present & (kept == 0)
    stays_at = tl.cumsum(kept.to(tl.int32), 0) - 1
    goes_at = tl.cumsum(goes.to(tl.int32), 0) - 1
    tl.store(kept_ptr + image * stay + stays_at, token.to(tl.int64), mask=kept)
    tl.store(kept_cell_ptr + image * stay + stays_at, cell.to(tl.int64), mask=kept)
    leaving = tokens - stay
    tl.store(leaving_ptr + image * leaving + goes_at, token.to(tl.int64), mask=goes)
    tl.store(leaving_cell_ptr + image * leaving + goes_at, cell.to(tl.int64), mask=goes)
    place = tl.where(kept, stays_at, tl.where(goes, -2 - token, -1))
    tl.store(place_ptr + image * cells + cell, place, mask=inside)


def _shapes(score_BN, before_BG, propagated, cells):  # type: ignore[no-untyped-def]
    batch, tokens = score_BN.shape
    kept, leaving = (score_BN.new_empty(batch, n, dtype=torch.int64) for n in (tokens - propagated, propagated))
    place_BG = score_BN.new_empty(batch, cells, dtype=torch.int32)
    return kept, leaving, torch.empty_like(kept), torch.empty_like(leaving), place_BG


@shaped("select", _shapes)
@torch.library.triton_op("gtp_fx_kernels::select", mutates_args={})
def select(
    score_BN: Tensor, before_BG: Tensor | None, propagated: int, cells: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `torch.ops.gtp_fx.select`, to the last index, and where that is on the grid.

    score_BN: [B, n] float32, any strides. before_BG: the map of the site before, or None while all n = `cells` tokens are
    there. cells: G, the whole grid's patches, at most `MOST_CELLS`.
    Returns kept [B, n - P] and propagated [B, P] among the n tokens, the same two among the cells, and the map (see above).
    """
    batch, tokens = score_BN.shape
    kept_BK, kept_cell_BK = (score_BN.new_empty(batch, tokens - propagated, dtype=torch.int64) for _ in range(2))
    leaving_BP, leaving_cell_BP = (score_BN.new_empty(batch, propagated, dtype=torch.int64) for _ in range(2))
    place_BG = score_BN.new_empty(batch, cells, dtype=torch.int32)
    block = power_of_two(cells)
    launcher(select_kernel)[(batch,)](
        score_BN, place_BG if before_BG is None else before_BG, kept_BK, leaving_BP, kept_cell_BK, leaving_cell_BP, place_BG,
        cells, tokens, tokens - propagated, *score_BN.stride(),
        WHOLE=before_BG is None, CELLS=block, num_warps=min(max(block // 512, 1), 8),
    )  # fmt: skip
    return kept_BK, leaving_BP, kept_cell_BK, leaving_cell_BP, place_BG
