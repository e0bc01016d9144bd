"""The token graph in one kernel (arXiv 2311.03035, sparse graph construction).

A program owns some rows of the similarity matrix. It makes a tile of columns at a time, and holds each row's M best
entries so far in registers. Nothing of size G x G is in memory, and nothing is sorted: from each tile the largest entry
is taken as often as one may still enter a list, which is soon seldom. The degrees follow from the neighbours.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gtp_fx.kernels.backward import not_differentiable
from gtp_fx.kernels.launch import launcher
from gtp_fx.kernels.tile_ops import product
from gtp_fx.kernels.tiles import graph_tile
from gtp_fx.ops.register import shaped

MOST_NEIGHBORS = 32
"""Largest M: a program holds each row's list in registers."""

_NOTHING, _ABOVE_ALL = tl.constexpr(float("-inf")), tl.constexpr(float("inf"))
_LEAST, _FAR = tl.constexpr(torch.finfo(torch.float32).min), tl.constexpr(2**31 - 1)


@triton.jit
def token_graph_kernel(  # type: ignore[no-untyped-def]
    x_ptr, inverse_ptr, near_ptr, degree_ptr, x_image, x_row, x_channel, channels,
    tokens, prefix, depth, height, width, neighbors,
    SPATIAL: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Find the neighbours of `ROWS` cells of an image, and their degrees.

    inverse: one over each token's norm, [B, N].
    near: each cell's M most similar cells, [B, G, M].
    degree: D^-1/2, [B, G].
    """
    cells = depth * height * width
    blocks = tl.cdiv(cells, ROWS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    slot = tl.arange(0, SLOTS)
    x_ptr += image * x_image + prefix * x_row
    inverse_ptr += image * tokens + prefix
    # Rows and columns after the last cell repeat it, since loads without a mask are cheaper; they are excluded later.
    rows_ptr = x_ptr + tl.minimum(row, cells - 1)[:, None] * x_row + channel[None, :] * x_channel
    # Empty slots accept anything (-inf); slots after the M-th accept nothing (inf). Distinct negative indices identify
    # the slots that are still empty.
    best = tl.zeros((ROWS, SLOTS), tl.float32) + tl.where(slot < neighbors, _NOTHING, _ABOVE_ALL)[None, :]
    near = tl.zeros((ROWS, SLOTS), tl.int32) - 1 - slot[None, :]
    for start in range(0, cells, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        columns_ptr = x_ptr + channel[:, None] * x_channel + tl.minimum(column, cells - 1)[None, :] * x_row
        dots = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(0, channels, CHANNELS):
            if WHOLE:
                rows = tl.load(rows_ptr + first * x_channel)
                columns = tl.load(columns_ptr + first * x_channel)
            else:
                inside = channel < channels - first
                rows = tl.load(rows_ptr + first * x_channel, mask=inside[None, :], other=0.0)
                columns = tl.load(columns_ptr + first * x_channel, mask=inside[:, None], other=0.0)
            dots += product(rows, columns)
        inverse = tl.load(inverse_ptr + column, mask=column < cells, other=0.0)
        alike = dots * inverse[None, :]
        # Pairs that don't exist are below every number, and NaN is above, so any tokens have M neighbours.
        another = (column < cells)[None, :] & (row[:, None] != column[None, :])
        alike = tl.where(another, tl.where(alike != alike, _ABOVE_ALL, tl.maximum(alike, _LEAST)), _NOTHING)
        # The tile's largest entry replaces the list's least, while any row has an entry that may. Among equal entries
        # the first replaces the last.
        better = tl.sum((alike > tl.min(best, 1)[:, None]).to(tl.int32), 1)
        for _ in range(tl.minimum(tl.max(better), neighbors)):
            most = tl.max(alike, 1)
            which = tl.min(tl.where(alike == most[:, None], column[None, :], _FAR), 1)
            alike = tl.where(column[None, :] == which[:, None], _NOTHING, alike)
            worst = tl.min(best, 1)
            latest = tl.max(tl.where(best == worst[:, None], near, -_FAR), 1)
            goes = (near == latest[:, None]) & (most > worst)[:, None]
            best = tl.where(goes, most[:, None], best)
            near = tl.where(goes, which[:, None], near)
    edge = near >= 0
    stored = edge & (row < cells)[:, None]
    tl.store(near_ptr + (image * cells + row)[:, None] * neighbors + slot[None, :], near, mask=stored)
    around = row * 0
    if SPATIAL:  # an edge of both graphs counts once in their union
        here_z, here_y, here_x = row // (height * width), (row // width) % height, row % width
        far_z = tl.abs(near // (height * width) - here_z[:, None])
        far_y = tl.abs((near // width) % height - here_y[:, None])
        far_x = tl.abs(near % width - here_x[:, None])
        edge = edge & (tl.maximum(tl.maximum(far_z, far_y), far_x) > 1)
        around = _within_one(here_z, depth) * _within_one(here_y, height) * _within_one(here_x, width) - 1
    degree = around + tl.sum(edge.to(tl.int32), 1)
    tl.store(degree_ptr + image * cells + row, tl.rsqrt(degree.to(tl.float32)), mask=row < cells)


@triton.jit
def _within_one(here, side):  # type: ignore[no-untyped-def]
    """Return how many places of `side` are at most one away from `here`, including itself."""
    return tl.minimum(here + 1, side - 1) - tl.maximum(here - 1, 0) + 1


def _shapes(x_BNC, grid, prefix, kind, neighbors):  # type: ignore[no-untyped-def]
    batch, cells = x_BNC.shape[0], math.prod(grid)
    near = x_BNC.new_empty(batch, cells, neighbors, dtype=torch.int32)
    return near, x_BNC.new_empty(batch, cells, dtype=torch.float32)


@shaped("token_graph", _shapes)
@torch.library.triton_op("gtp_fx_kernels::token_graph", mutates_args={})
def token_graph(x_BNC: Tensor, grid: list[int], prefix: int, kind: str, neighbors: int) -> tuple[Tensor, Tensor]:
    """Return the neighbours and degrees of `torch.ops.gtp_fx.token_graph` of kind "semantic" or "mixed".

    x_BNC: [B, prefix + G (+ suffix), C] of float32, bfloat16 or float16, any strides.
    grid: one to three sides, of G cells.
    kind: "semantic" or "mixed".
    neighbors: M, at least 1, at most `MOST_NEIGHBORS` and less than G.

    Returns near [B, G, M], int32 and in no order, and D^-1/2 [B, G], float32, where every degree is at least M. No
    gradients, as the operator has none.

    Of equal similarities the lower index comes first, which topk leaves open. NaN is above all, as in topk. Whatever
    the tokens hold, a cell's M indices are different ones of other cells.

    Tolerance: products of bfloat16 or float16 numbers are exact in float32, and those of float32 tokens are IEEE (no
    TF32); sums are in float32. A row isn't divided by its own norm, which doesn't change its order. So neighbours are
    those of the operator in float32, except for the order of sums: tensor cores round C / 16 times, by 2^-23 at most.
    So two similarities that differ by less than 1e-5 may change places where C is 1280.
    """
    batch, tokens, channels = x_BNC.shape
    cells = math.prod(grid)
    x_BNC = x_BNC.detach()
    # For all tokens, so that a compiler can fuse it with the first norm's pass over the same rows.
    inverse_BN = x_BNC.float().square().sum(dim=-1).clamp(min=1e-24).rsqrt().contiguous()
    near_BGM = x_BNC.new_empty(batch, cells, neighbors, dtype=torch.int32)
    degree_BG = x_BNC.new_empty(batch, cells, dtype=torch.float32)
    depth, height, width = (1,) * (3 - len(grid)) + tuple(grid)
    tile = graph_tile(batch, cells, x_BNC.dtype)
    launcher(token_graph_kernel)[(batch * triton.cdiv(cells, tile.rows),)](
        x_BNC, inverse_BN, near_BGM, degree_BG, *x_BNC.stride(), channels,
        tokens, prefix, depth, height, width, neighbors,
        SPATIAL=kind == "mixed", WHOLE=channels % tile.channels == 0,
        ROWS=tile.rows, COLUMNS=tile.columns, CHANNELS=tile.channels, SLOTS=1 << (neighbors - 1).bit_length(),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return near_BGM, degree_BG


not_differentiable(token_graph)
