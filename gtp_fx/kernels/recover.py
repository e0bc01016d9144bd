"""Recovery fused into the residual add: kept tokens go back to their places, the others get their share of their neighbours'.

Shares are handed in, or made from coordinates where they follow the spatial graph, as in windows; then no [P, K] is in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gtp_fx.kernels.backward import differentiable
from gtp_fx.kernels.launch import launcher
from gtp_fx.kernels.tile_ops import load_tile, product
from gtp_fx.kernels.tiles import power_of_two
from gtp_fx.ops.register import shaped
from gtp_fx.ops.take_recover import recover as recover_reference
from gtp_fx.ops.window_shares import region_shares

_FAR = tl.constexpr(2**30)


@triton.jit
def recover_kernel(  # type: ignore[no-untyped-def]
    x_ptr, shares_ptr, places_ptr, degree_ptr, residual_ptr, kept_ptr, left_ptr, out_ptr,
    x_image, x_row, x_channel, residual_image, residual_row, residual_channel,
    channels, prefix, kept, left, suffix, windows, sides,
    HAS_SHARES: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """`ROWS` tokens that stayed, or that left, and `CHANNELS` of their channels. shares: [B, P, K], or made from
    places [W, n, sides] and degree [W, n], which is how many neighbours a token has in its window."""
    whole = prefix + kept + left + suffix
    staying = whole - left
    channel_blocks = tl.cdiv(channels, CHANNELS)
    stay_blocks = tl.cdiv(staying, ROWS)
    blocks = stay_blocks + tl.cdiv(left, ROWS)
    channel = (tl.program_id(0) % channel_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    block = (tl.program_id(0) // channel_blocks) % blocks
    image = (tl.program_id(0) // channel_blocks // blocks).to(tl.int64)
    window = image % windows
    x_ptr += image * x_image
    row = block * ROWS + tl.arange(0, ROWS)
    if block < stay_blocks:
        inside = row < staying
        patch = row - prefix
        is_patch = inside & (patch >= 0) & (patch < kept)
        token = tl.load(kept_ptr + image * kept + patch, mask=is_patch, other=0).to(tl.int32)
        target = tl.where(is_patch, prefix + token, tl.where(patch < 0, row, row + left))
        made = load_tile(x_ptr, row, channel, x_row, x_channel, staying, channels).to(tl.float32)
    else:
        row -= stay_blocks * ROWS
        inside = row < left
        token = tl.load(left_ptr + image * left + row, mask=inside, other=0).to(tl.int32)
        target = prefix + token
        tokens = kept + left
        made = tl.zeros((ROWS, CHANNELS), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        least = tl.full((ROWS,), _FAR, tl.int32)
        nearest = tl.zeros((ROWS,), tl.int32)
        for start in range(0, kept, KEYS):
            key = start + tl.arange(0, KEYS)
            pairs = inside[:, None] & (key < kept)[None, :]
            if HAS_SHARES:
                weight = tl.load(
                    shares_ptr + (image * left + row)[:, None] * kept + key[None, :], mask=pairs, other=0.0
                )
            else:
                giver = tl.load(kept_ptr + image * kept + key, mask=key < kept, other=0).to(tl.int32)
                touching = tl.zeros((ROWS, KEYS), tl.int32)
                apart = tl.zeros((ROWS, KEYS), tl.int32)
                for side in range(sides):
                    here = tl.load(places_ptr + (window * tokens + token) * sides + side, mask=inside, other=0).to(
                        tl.int32
                    )
                    there_at = (window * tokens + giver) * sides + side
                    there = tl.load(places_ptr + there_at, mask=key < kept, other=0).to(tl.int32)
                    between = tl.abs(here[:, None] - there[None, :])
                    touching = tl.maximum(touching, between)
                    apart += between * between
                degree = tl.load(degree_ptr + window * tokens + giver, mask=key < kept, other=1.0)
                weight = tl.where(pairs & (touching == 1), tl.rsqrt(degree)[None, :], 0.0)
                apart = tl.where(pairs, apart, _FAR)
                closest = tl.min(apart, 1)
                first = tl.min(tl.where(apart == closest[:, None], key[None, :], kept), 1)
                nearest = tl.where(closest < least, first, nearest)
                least = tl.minimum(closest, least)
            total += tl.sum(weight, 1)
            rows = load_tile(x_ptr, prefix + key, channel, x_row, x_channel, prefix + kept, channels)
            made += product(weight.to(rows.dtype), rows)
        if not HAS_SHARES:
            lonely = total == 0.0
            made = made / tl.where(lonely, 1.0, total)[:, None]
            instead = inside & lonely
            at_nearest = (prefix + nearest)[:, None].to(tl.int64) * x_row + channel[None, :] * x_channel
            alone = tl.load(x_ptr + at_nearest, mask=instead[:, None] & (channel < channels)[None, :], other=0.0)
            made = tl.where(lonely[:, None], alone.to(tl.float32), made)
    stored = inside[:, None] & (channel < channels)[None, :]
    made = made.to(out_ptr.dtype.element_ty)
    if HAS_RESIDUAL:
        at = image * residual_image + target[:, None].to(tl.int64) * residual_row + channel[None, :] * residual_channel
        made = (made.to(tl.float32) + tl.load(residual_ptr + at, mask=stored, other=0.0).to(tl.float32)).to(made.dtype)
    tl.store(out_ptr + (image * whole + target)[:, None] * channels + channel[None, :], made, mask=stored)


def _shapes(x, shares, places, residual, kept, left, prefix, suffix):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], x.shape[1] + left.shape[1], x.shape[2])


@shaped("recover", _shapes)
@torch.library.triton_op("gtp_fx_kernels::recover", mutates_args={})
def recover(
    x: Tensor,
    shares: Tensor | None,
    places: Tensor | None,
    residual: Tensor | None,
    kept: Tensor,
    left: Tensor,
    prefix: int,
    suffix: int,
) -> Tensor:
    """As `torch.ops.gtp_fx.recover` of [B, prefix + K + suffix, C], plus `residual` [B, prefix + K + P + suffix, C] if given.

    shares: [B, P, K] float32; or None, and places [W, n, R] as `region_shares` takes them, with B = images * W.
    Tolerance: shares are rounded to x's dtype, as the reference does, before they are divided by their sum instead of after; the
    result is rounded once before and once behind the residual. Within 2^-8 of the largest |x| in bfloat16.
    """
    batch, rows_in, channels = x.shape
    stay, gone = kept.shape[1], left.shape[1]
    out = x.new_empty(batch, rows_in + gone, channels)
    windows, sides, degree = 1, 0, kept
    if shares is None:
        assert places is not None, "shares, or places to make them from"
        places = places.contiguous()
        windows, _, sides = places.shape
        degree = _degrees(places)
    block = min(128, power_of_two(channels))
    rows, keys = (16, 16) if stay + gone <= 64 else (32, 32)
    programs = batch * (triton.cdiv(rows_in, rows) + triton.cdiv(gone, rows)) * triton.cdiv(channels, block)
    launcher(recover_kernel)[(programs,)](
        x, kept if shares is None else shares.contiguous(), kept if places is None else places, degree,
        x if residual is None else residual, kept, left, out,
        *x.stride(), *(x if residual is None else residual).stride(), channels, prefix, stay, gone, suffix, windows, sides,
        HAS_SHARES=shares is not None, HAS_RESIDUAL=residual is not None,
        ROWS=rows, KEYS=keys, CHANNELS=block, num_warps=4,
    )  # fmt: skip
    return out


def _degrees(places_WnR: Tensor) -> Tensor:
    """[W, n] float32, at least 1."""
    apart_Wnn = (places_WnR[:, :, None] - places_WnR[:, None]).abs().amax(dim=-1)
    return apart_Wnn.eq(1).sum(dim=-1).clamp(min=1).float()


def _reference(x, shares, places, residual, kept, left, prefix, suffix):  # type: ignore[no-untyped-def]
    if shares is None:
        shares = region_shares(places, kept, left)
    whole = recover_reference(x, shares, kept, left, 0, 1, prefix, suffix)
    return (whole if residual is None else whole + residual,)


differentiable(recover, _reference)
