"""Propagation, with the residual add before it and the norm behind: one read of the stream and one write of each result
(arXiv 2311.03035, token summarisation).

A token's neighbours are a handful of cells: those around it, and the M most similar. The map that `select` leaves says which of
them leave now, so each row adds the few rows that it receives, in a fixed order. Nothing of size N x N, in no dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from gtp_fx.kernels.backward import differentiable
from gtp_fx.kernels.launch import launcher
from gtp_fx.kernels.tile_ops import INTERPRETED
from gtp_fx.kernels.tiles import PropagationTile, power_of_two, propagation_tiles
from gtp_fx.ops.propagate import propagate as propagate_reference
from gtp_fx.ops.register import shaped
from gtp_fx.ops.token_graph import propagation_weights

MOST_CHANNELS = 8_192
"""A row of the stream is held in registers."""
_LANES = 32
"""A warp's: candidates fill it at least. With fewer, each lane would hold several of the same, in registers."""
_INTERPRETER = PropagationTile(16, 1)
"""Taken in Triton's interpreter, to which a program costs the same whatever its rows."""


@triton.jit
def stream_rows(  # type: ignore[no-untyped-def]
    x_ptr, residual_ptr, gain_ptr, rows, channel, inside, x_row, x_channel, residual_row, residual_channel, channels,
    HAS_RESIDUAL: tl.constexpr, HAS_GAIN: tl.constexpr,
):  # fmt: skip
    """[rows, channels] of x + residual * gain in float32, rounded as the operators alone would round; 0 outside."""
    found = tl.load(x_ptr + rows[:, None] * x_row + channel[None, :] * x_channel, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        at = rows[:, None] * residual_row + channel[None, :] * residual_channel
        added = tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_GAIN:
            gain = tl.load(gain_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
            added = (added * gain[None, :]).to(found.dtype).to(tl.float32)
        found = (found.to(tl.float32) + added).to(found.dtype)
    return found.to(tl.float32)


@triton.jit
def propagate_kernel(  # type: ignore[no-untyped-def]
    x_ptr, residual_ptr, gain_ptr, near_ptr, degree_ptr, kept_ptr, cell_ptr, place_ptr, scale_ptr, weight_ptr, bias_ptr,
    out_ptr, normed_ptr, moved_ptr,
    x_image, x_row, x_channel, residual_image, residual_row, residual_channel,
    channels, prefix, kept, leaving, staying, depth, height, width, neighbors, alpha, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_GAIN: tl.constexpr, SPATIAL: tl.constexpr, SEMANTIC: tl.constexpr, DEEP: tl.constexpr, HAS_SCALES: tl.constexpr, TELLS: tl.constexpr,
    NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, CANDIDATES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """`ROWS` rows of the shorter stream. degree: D^-1/2 by cell. scale: of the tokens before; moved: of those that stay."""
    blocks = tl.cdiv(staying, ROWS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    inside = row < staying
    patch = row - prefix
    is_patch = inside & (patch >= 0) & (patch < kept)
    cells = depth * height * width
    at_kept = image * kept + patch
    token = tl.load(kept_ptr + at_kept, mask=is_patch, other=0).to(tl.int32)
    cell = tl.load(cell_ptr + at_kept, mask=is_patch, other=0).to(tl.int32)
    source = tl.where(is_patch, prefix + token, tl.where(patch < 0, row, row + leaving))
    channel = tl.arange(0, CHANNELS)
    in_row = channel < channels
    x_ptr += image * x_image
    residual_ptr += image * residual_image
    stored = inside[:, None] & in_row[None, :]
    x = stream_rows(
        x_ptr, residual_ptr, gain_ptr, source.to(tl.int64), channel, stored,
        x_row, x_channel, residual_row, residual_channel, channels, HAS_RESIDUAL, HAS_GAIN,
    )  # fmt: skip
    # Candidates: the 3 x 3 (x 3) cells around, itself among them, then the M most similar.
    candidate = tl.arange(0, CANDIDATES)
    around = 0
    here_z, here_y, here_x = cell // (height * width), (cell // width) % height, cell % width
    other = tl.zeros((ROWS, CANDIDATES), tl.int32)
    edge = other != 0
    if SPATIAL:
        around = 27 if DEEP else 9
        z = here_z[:, None] + (candidate // 9 - 1 if DEEP else candidate * 0)[None, :]
        y = here_y[:, None] + (candidate // 3 % 3 - 1)[None, :]
        x_side = here_x[:, None] + (candidate % 3 - 1)[None, :]
        on_grid = (z >= 0) & (z < depth) & (y >= 0) & (y < height) & (x_side >= 0) & (x_side < width)
        other = (z * height + y) * width + x_side
        edge = (candidate < around)[None, :] & on_grid & (other != cell[:, None])
    if SEMANTIC:
        which = candidate - around
        similar = ((which >= 0) & (which < neighbors))[None, :] & is_patch[:, None]
        at_near = (image * cells + cell)[:, None] * neighbors + which[None, :]
        found = tl.load(near_ptr + at_near, mask=similar, other=0).to(tl.int32)
        other = tl.where(similar, found, other)
        if SPATIAL:  # in the union an edge counts once
            far_z = tl.abs(found // (height * width) - here_z[:, None])
            far_y = tl.abs((found // width) % height - here_y[:, None])
            far_x = tl.abs(found % width - here_x[:, None])
            similar = similar & (tl.maximum(tl.maximum(far_z, far_y), far_x) > 1)
        edge = edge | similar
    edge = edge & is_patch[:, None]
    place = tl.load(place_ptr + image * cells + other, mask=edge, other=-1)
    gives = edge & (place <= -2)
    given = -2 - place
    weight = tl.load(degree_ptr + image * cells + other, mask=gives, other=0.0)
    weight = weight * tl.load(degree_ptr + image * cells + cell, mask=is_patch, other=0.0)[:, None]
    turn = tl.cumsum(gives.to(tl.int32), 1)
    received = tl.zeros((ROWS, CHANNELS), tl.float32)
    for i in range(tl.max(tl.sum(gives.to(tl.int32), 1))):
        this = gives & (turn == i + 1)
        one = tl.sum(this.to(tl.int32), 1) > 0
        from_row = prefix + tl.sum(tl.where(this, given, 0), 1)
        share = tl.sum(tl.where(this, weight, 0.0), 1)
        received += share[:, None] * stream_rows(
            x_ptr, residual_ptr, gain_ptr, from_row.to(tl.int64), channel, one[:, None] & in_row[None, :],
            x_row, x_channel, residual_row, residual_channel, channels, HAS_RESIDUAL, HAS_GAIN,
        )  # fmt: skip
    out = (x + alpha * received).to(out_ptr.dtype.element_ty)
    at_out = (image * staying + row)[:, None] * channels + channel[None, :]
    tl.store(out_ptr + at_out, out, mask=stored)
    if TELLS:
        tokens = kept + leaving
        own, theirs = 1.0, 1.0
        if HAS_SCALES:
            own = tl.load(scale_ptr + image * tokens + token, mask=is_patch, other=0.0)
            theirs = tl.load(scale_ptr + image * tokens + given, mask=gives, other=0.0)
        moved = own + alpha * tl.sum(tl.where(gives, weight * theirs, 0.0), 1)
        tl.store(moved_ptr + at_kept, moved, mask=is_patch)
    if NORM:
        value = out.to(tl.float32)
        mean = tl.sum(value, 1) / channels
        apart = tl.where(in_row[None, :], value - mean[:, None], 0.0)
        normed = apart * tl.rsqrt(tl.sum(apart * apart, 1) / channels + eps)[:, None]
        if HAS_WEIGHT:
            normed *= tl.load(weight_ptr + channel, mask=in_row, other=0.0).to(tl.float32)[None, :]
        if HAS_BIAS:
            normed += tl.load(bias_ptr + channel, mask=in_row, other=0.0).to(tl.float32)[None, :]
        tl.store(normed_ptr + at_out, normed.to(normed_ptr.dtype.element_ty), mask=stored)


def _shapes(x, residual, near, degree, kept, leaving, kept_cell, leaving_cell, place, scales, weight, bias, grid, kind, alpha, prefix, eps, tells, tile, gain=None):  # type: ignore[no-untyped-def]  # fmt: skip
    batch, tokens, channels = x.shape
    shorter = x.new_empty(batch, tokens - leaving.shape[1], channels)
    normed = x.new_empty(shorter.shape if eps >= 0 else (0,))
    return shorter, x.new_empty(kept.shape if tells else (0,), dtype=torch.float32), normed


@shaped("propagate", _shapes)
@torch.library.triton_op("gtp_fx_kernels::propagate", mutates_args={})
def propagate(
    x: Tensor,
    residual: Tensor | None,
    near: Tensor,
    degree: Tensor,
    kept: Tensor,
    leaving: Tensor,
    kept_cell: Tensor,
    leaving_cell: Tensor,
    place: Tensor,
    scales: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    grid: list[int],
    kind: str,
    alpha: float,
    prefix: int,
    eps: float,
    tells: bool,
    tile: list[int],
    gain: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `torch.ops.gtp_fx.propagate` for the stream and for its token scales, and `layer_norm` of the stream.

    x: [B, prefix + n + suffix, C], any strides, C at most `MOST_CHANNELS`. residual: of x's shape and dtype, any strides: the
    stream is x + residual, or x + residual * gain with a gain of C numbers (LayerScale), made as rows are read and never written; with
    None it is x. near [B, G, M], degree [B, G]: from `token_graph`, of kind `kind`
    over `grid` of one to three sides. kept, leaving, kept_cell, leaving_cell, place: from `select`. scales: [B, n], or None for all 1.
    weight, bias, eps: of the layer norm behind; eps below 0 for none. tells: whether anybody asks for the scales.
    tile: `PropagationTile.arguments`, or [] for the best that is known.
    Returns the shorter stream, its patches' scales [B, K] (empty unless `tells`) and the normed stream (empty without).

    Tolerance: sums are in float32 and rounded once, where the reference in a lower dtype rounds weights, sum and product;
    so it is the nearer one to float32, and within 2^-8 of what a token receives of the reference in bfloat16. What is made
    of residual and gain is rounded as the operators would round it, so the numbers are those of a stream that was added before (but
    float32, where a product and its sum may be rounded once).
    """
    batch, tokens, channels = x.shape
    gone = leaving.shape[1]
    staying = tokens - gone
    normed = eps >= 0
    out = x.new_empty(batch, staying, channels)
    after = x.new_empty(out.shape if normed else (1,))  # what isn't written has a place all the same
    moved = x.new_empty(kept.shape if tells else (1,), dtype=torch.float32)
    depth, height, width = (1,) * (3 - len(grid)) + tuple(grid)
    spatial, semantic = kind != "semantic", kind != "spatial"
    candidates = (27 if depth > 1 else 9) * spatial + near.shape[-1] * semantic
    cut = PropagationTile(*tile) if tile else _INTERPRETER if INTERPRETED else propagation_tiles(channels)[0]
    added = x if residual is None else residual
    launcher(propagate_kernel)[(batch * triton.cdiv(staying, cut.rows),)](
        x, added, degree if gain is None else gain.contiguous(), near, degree.contiguous(), kept, kept_cell, place,
        *(degree if optional is None else optional.contiguous() for optional in (scales, weight, bias)),
        out, after, moved,
        *x.stride(), *added.stride(), channels, prefix, kept.shape[1], gone, staying, depth, height, width, near.shape[-1], alpha, eps,
        HAS_RESIDUAL=residual is not None, HAS_GAIN=gain is not None, SPATIAL=spatial, SEMANTIC=semantic, DEEP=depth > 1, HAS_SCALES=scales is not None, TELLS=tells,
        NORM=normed, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
        ROWS=cut.rows, CANDIDATES=max(_LANES, power_of_two(candidates)), CHANNELS=power_of_two(channels), num_warps=cut.warps,
    )  # fmt: skip
    return out, moved if tells else degree.new_empty(0), after if normed else x.new_empty(0)


def _reference(x, residual, near, degree, kept, leaving, kept_cell, leaving_cell, place, scales, weight, bias, grid, kind, alpha, prefix, eps, tells, tile, gain=None):  # type: ignore[no-untyped-def]  # fmt: skip
    weights = propagation_weights(near, degree, kept_cell, leaving_cell, grid, kind)
    if residual is not None:
        x = x + (residual if gain is None else residual * gain)
    shorter = propagate_reference(x, weights, kept, leaving, alpha, prefix)
    moved = shorter.new_empty(0)
    if tells:
        before = degree.new_ones(kept.shape[0], kept.shape[1] + leaving.shape[1]) if scales is None else scales
        moved = propagate_reference(before[..., None], weights, kept, leaving, alpha, 0)[..., 0]
    normed = F.layer_norm(shorter, shorter.shape[-1:], weight, bias, eps) if eps >= 0 else shorter.new_empty(0)
    return shorter, moved, normed


differentiable(propagate, _reference)
