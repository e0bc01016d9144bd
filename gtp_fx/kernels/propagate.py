"""Propagation fused with the residual add before it and the norm after it (arXiv 2311.03035, token summarisation).

The stream is read once and each result written once. A token's neighbours are a handful of cells: those around it and
the M most similar. The map that `select` returns says which of them are removed at this site, so each row adds the few
rows that it receives, in a fixed order. Nothing of size N x N is made.
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
"""Largest number of channels: a program holds a whole row of the stream in registers."""
_LANES = 32
"""Lanes of a warp, the least number of candidates: with fewer, several lanes would hold copies of the same one."""
_INTERPRETER = PropagationTile(16, 1)
"""Tile for Triton's interpreter, where a program takes the same time whatever its rows."""


@triton.jit
def stream_rows(  # type: ignore[no-untyped-def]
    x_ptr, residual_ptr, gain_ptr, rows, channel, inside, x_row, x_channel, residual_row, residual_channel, channels,
    HAS_RESIDUAL: tl.constexpr, HAS_GAIN: tl.constexpr,
):  # fmt: skip
    """Return x + residual * gain as [rows, channels] in float32, rounded as separate operators would; 0 outside."""
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
    channels, prefix, kept, removed, staying, depth, height, width, neighbors, alpha, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_GAIN: tl.constexpr, SPATIAL: tl.constexpr, SEMANTIC: tl.constexpr,
    DEEP: tl.constexpr, HAS_SCALES: tl.constexpr, TELLS: tl.constexpr,
    NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, CANDIDATES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Make `ROWS` rows of the shorter stream, `out`, and with NORM of the normed stream.

    near: each cell's M most similar cells, [B, G, M].
    degree: D^-1/2 of each cell, [B, G].
    place: the map of `select`, [B, G].
    scale: token scales before the site, [B, n], with HAS_SCALES.
    moved: token scales of the kept patches after it, [B, K], with TELLS.
    """
    blocks = tl.cdiv(staying, ROWS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    inside = row < staying
    # A row is a prefix token, a kept patch or a suffix token; `source` is its row in the stream before.
    patch = row - prefix
    is_patch = inside & (patch >= 0) & (patch < kept)
    cells = depth * height * width
    at_kept = image * kept + patch
    token = tl.load(kept_ptr + at_kept, mask=is_patch, other=0).to(tl.int32)
    cell = tl.load(cell_ptr + at_kept, mask=is_patch, other=0).to(tl.int32)
    source = tl.where(is_patch, prefix + token, tl.where(patch < 0, row, row + removed))
    channel = tl.arange(0, CHANNELS)
    in_row = channel < channels
    x_ptr += image * x_image
    residual_ptr += image * residual_image
    stored = inside[:, None] & in_row[None, :]
    x = stream_rows(
        x_ptr, residual_ptr, gain_ptr, source.to(tl.int64), channel, stored,
        x_row, x_channel, residual_row, residual_channel, channels, HAS_RESIDUAL, HAS_GAIN,
    )  # fmt: skip
    # Candidates for neighbours: the 3 x 3 (x 3) cells around, the cell itself included, then the M most similar.
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
        if SPATIAL:  # an edge of both graphs counts once in their union
            far_z = tl.abs(found // (height * width) - here_z[:, None])
            far_y = tl.abs((found // width) % height - here_y[:, None])
            far_x = tl.abs(found % width - here_x[:, None])
            similar = similar & (tl.maximum(tl.maximum(far_z, far_y), far_x) > 1)
        edge = edge | similar
    edge = edge & is_patch[:, None]
    # Those neighbours that are removed at this site give: the map holds -2 - i for the token i of the stream before.
    place = tl.load(place_ptr + image * cells + other, mask=edge, other=-1)
    gives = edge & (place <= -2)
    given = -2 - place
    weight = tl.load(degree_ptr + image * cells + other, mask=gives, other=0.0)
    weight = weight * tl.load(degree_ptr + image * cells + cell, mask=is_patch, other=0.0)[:, None]
    # Each round adds the next giver of every row, so there are as many rounds as the most givers of a row in the tile.
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
    if TELLS:  # token scales are propagated as the tokens are
        tokens = kept + removed
        own, theirs = 1.0, 1.0
        if HAS_SCALES:
            own = tl.load(scale_ptr + image * tokens + token, mask=is_patch, other=0.0)
            theirs = tl.load(scale_ptr + image * tokens + given, mask=gives, other=0.0)
        moved = own + alpha * tl.sum(tl.where(gives, weight * theirs, 0.0), 1)
        tl.store(moved_ptr + at_kept, moved, mask=is_patch)
    if NORM:
        value = out.to(tl.float32)
        mean = tl.sum(value, 1) / channels
        centred = tl.where(in_row[None, :], value - mean[:, None], 0.0)
        normed = centred * tl.rsqrt(tl.sum(centred * centred, 1) / channels + eps)[:, None]
        if HAS_WEIGHT:
            normed *= tl.load(weight_ptr + channel, mask=in_row, other=0.0).to(tl.float32)[None, :]
        if HAS_BIAS:
            normed += tl.load(bias_ptr + channel, mask=in_row, other=0.0).to(tl.float32)[None, :]
        tl.store(normed_ptr + at_out, normed.to(normed_ptr.dtype.element_ty), mask=stored)


def _shapes(  # type: ignore[no-untyped-def]
    x, residual, near, degree, kept, removed, kept_cell, removed_cell, place, scales, weight, bias,
    grid, kind, alpha, prefix, eps, tells, tile, gain=None,
):  # fmt: skip
    batch, tokens, channels = x.shape
    shorter = x.new_empty(batch, tokens - removed.shape[1], channels)
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
    removed: Tensor,
    kept_cell: Tensor,
    removed_cell: Tensor,
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
    """Apply `torch.ops.gtp_fx.propagate` to the stream and to its token scales, and `layer_norm` to the result.

    x: [B, prefix + n + suffix, C], any strides, C at most `MOST_CHANNELS`.
    residual: of x's shape and dtype, any strides, or None. The stream is x + residual, made as rows are read and never
        written; without a residual it is x.
    near, degree: [B, G, M] and [B, G], from `token_graph`.
    kept, removed, kept_cell, removed_cell, place: from `select`.
    scales: token scales [B, n], or None where all are 1.
    weight, bias, eps: of the layer norm after it; eps below 0 for no norm.
    grid: one to three sides.
    kind: of the graph, "spatial", "semantic" or "mixed".
    alpha: strength of the propagation.
    tells: whether the token scales are needed.
    tile: `PropagationTile.arguments`, or [] for the best that is known.
    gain: C numbers (LayerScale), by which the residual is multiplied first, or None.

    Returns the shorter stream [B, prefix + K + suffix, C], its patches' scales [B, K] (empty unless `tells`) and the
    normed stream (empty without a norm).

    Tolerance: sums are in float32 and rounded once, where the reference in a lower dtype rounds weights, sum and
    product. So the result is closer than the reference to that in float32. In bfloat16 it differs from the reference by
    at most 2^-8 of what a token receives. The sum with residual and gain is rounded as the operators would round it, so
    the numbers are those of a stream that was added before, except in float32, where a product and its sum may be
    rounded once.
    """
    batch, tokens, channels = x.shape
    removed_count = removed.shape[1]
    staying = tokens - removed_count
    normed = eps >= 0
    out = x.new_empty(batch, staying, channels)
    after = x.new_empty(out.shape if normed else (1,))  # an operand even if nothing is written to it
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
        *x.stride(), *added.stride(), channels, prefix, kept.shape[1], removed_count, staying,
        depth, height, width, near.shape[-1], alpha, eps,
        HAS_RESIDUAL=residual is not None, HAS_GAIN=gain is not None, SPATIAL=spatial, SEMANTIC=semantic,
        DEEP=depth > 1, HAS_SCALES=scales is not None, TELLS=tells,
        NORM=normed, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
        ROWS=cut.rows, CANDIDATES=max(_LANES, power_of_two(candidates)), CHANNELS=power_of_two(channels),
        num_warps=cut.warps,
    )  # fmt: skip
    return out, moved if tells else degree.new_empty(0), after if normed else x.new_empty(0)


def _reference(  # type: ignore[no-untyped-def]
    x, residual, near, degree, kept, removed, kept_cell, removed_cell, place, scales, weight, bias,
    grid, kind, alpha, prefix, eps, tells, tile, gain=None,
):  # fmt: skip
    """Return the same three results from the operators, for the gradients."""
    weights = propagation_weights(near, degree, kept_cell, removed_cell, grid, kind)
    if residual is not None:
        x = x + (residual if gain is None else residual * gain)
    shorter = propagate_reference(x, weights, kept, removed, alpha, prefix)
    moved = shorter.new_empty(0)
    if tells:
        before = degree.new_ones(kept.shape[0], kept.shape[1] + removed.shape[1]) if scales is None else scales
        moved = propagate_reference(before[..., None], weights, kept, removed, alpha, 0)[..., 0]
    normed = F.layer_norm(shorter, shorter.shape[-1:], weight, bias, eps) if eps >= 0 else shorter.new_empty(0)
    return shorter, moved, normed


differentiable(propagate, _reference)
