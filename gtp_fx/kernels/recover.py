"""Recovery fused with the residual add: kept tokens return to their places, removed ones get shares of the kept.

Shares are passed as a tensor, or made from coordinates where they follow the spatial graph, as in windows. Then no
[P, K] is in memory.
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
    x_ptr, shares_ptr, places_ptr, degree_ptr, residual_ptr, kept_ptr, removed_ptr, out_ptr,
    x_image, x_row, x_channel, residual_image, residual_row, residual_channel,
    channels, prefix, kept, removed, suffix, windows, sides,
    HAS_SHARES: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Restore `ROWS` kept, or `ROWS` removed, tokens in `CHANNELS` of their channels.

    shares: [B, P, K], with HAS_SHARES.
    places: coordinates of the tokens, [W, n, sides], from which shares are made otherwise.
    degree: how many neighbours a token has in its window, [W, n].
    """
    whole = prefix + kept + removed + suffix
    staying = whole - removed
    channel_blocks = tl.cdiv(channels, CHANNELS)
    stay_blocks = tl.cdiv(staying, ROWS)
    blocks = stay_blocks + tl.cdiv(removed, ROWS)
    channel = (tl.program_id(0) % channel_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    block = (tl.program_id(0) // channel_blocks) % blocks
    image = (tl.program_id(0) // channel_blocks // blocks).to(tl.int64)
    window = image % windows
    x_ptr += image * x_image
    row = block * ROWS + tl.arange(0, ROWS)
    if block < stay_blocks:  # prefix tokens, kept patches and suffix tokens are copied to their places
        inside = row < staying
        patch = row - prefix
        is_patch = inside & (patch >= 0) & (patch < kept)
        token = tl.load(kept_ptr + image * kept + patch, mask=is_patch, other=0).to(tl.int32)
        target = tl.where(is_patch, prefix + token, tl.where(patch < 0, row, row + removed))
        made = load_tile(x_ptr, row, channel, x_row, x_channel, staying, channels).to(tl.float32)
    else:
        # Removed tokens: the sum of all kept rows, each times its share, over a tile of kept tokens at a time.
        row -= stay_blocks * ROWS
        inside = row < removed
        token = tl.load(removed_ptr + image * removed + row, mask=inside, other=0).to(tl.int32)
        target = prefix + token
        tokens = kept + removed
        made = tl.zeros((ROWS, CHANNELS), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        least = tl.full((ROWS,), _FAR, tl.int32)
        nearest = tl.zeros((ROWS,), tl.int32)
        for start in range(0, kept, KEYS):
            key = start + tl.arange(0, KEYS)
            pairs = inside[:, None] & (key < kept)[None, :]
            if HAS_SHARES:
                weight = tl.load(
                    shares_ptr + (image * removed + row)[:, None] * kept + key[None, :], mask=pairs, other=0.0
                )
            else:
                # Tokens that touch have an edge, of weight D^-1/2 of the giver. (The receiver's own degree cancels out
                # in the division below.) The nearest kept token is noted for receivers without an edge.
                giver = tl.load(kept_ptr + image * kept + key, mask=key < kept, other=0).to(tl.int32)
                steps = tl.zeros((ROWS, KEYS), tl.int32)
                distance = tl.zeros((ROWS, KEYS), tl.int32)
                for side in range(sides):
                    here = tl.load(places_ptr + (window * tokens + token) * sides + side, mask=inside, other=0).to(
                        tl.int32
                    )
                    there_at = (window * tokens + giver) * sides + side
                    there = tl.load(places_ptr + there_at, mask=key < kept, other=0).to(tl.int32)
                    between = tl.abs(here[:, None] - there[None, :])
                    steps = tl.maximum(steps, between)
                    distance += between * between
                degree = tl.load(degree_ptr + window * tokens + giver, mask=key < kept, other=1.0)
                weight = tl.where(pairs & (steps == 1), tl.rsqrt(degree)[None, :], 0.0)
                distance = tl.where(pairs, distance, _FAR)
                closest = tl.min(distance, 1)
                first = tl.min(tl.where(distance == closest[:, None], key[None, :], kept), 1)
                nearest = tl.where(closest < least, first, nearest)
                least = tl.minimum(closest, least)
            total += tl.sum(weight, 1)
            rows = load_tile(x_ptr, prefix + key, channel, x_row, x_channel, prefix + kept, channels)
            made += product(weight.to(rows.dtype), rows)
        if not HAS_SHARES:  # shares are weights divided by their sum; without any, the nearest token's row is taken
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


def _shapes(x, shares, places, residual, kept, removed, prefix, suffix):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], x.shape[1] + removed.shape[1], x.shape[2])


@shaped("recover", _shapes)
@torch.library.triton_op("gtp_fx_kernels::recover", mutates_args={})
def recover(
    x: Tensor,
    shares: Tensor | None,
    places: Tensor | None,
    residual: Tensor | None,
    kept: Tensor,
    removed: Tensor,
    prefix: int,
    suffix: int,
) -> Tensor:
    """Return the stream at full length, as `torch.ops.gtp_fx.recover` does, plus `residual`.

    x: [B, prefix + K + suffix, C], any strides.
    shares: [B, P, K] float32, or None where `places` gives them.
    places: coordinates [W, n, R] as `region_shares` takes them, with B = images * W; read without `shares`.
    residual: [B, prefix + K + P + suffix, C], any strides, or None.
    kept, removed: indices [B, K] and [B, P] of the patches.

    Tolerance: shares are rounded to x's dtype, as by the reference. Those made from places are rounded before they are
    divided by their sum, where the reference rounds them after it. The result is rounded once before and
    once after the residual is added. Within 2^-8 of the largest |x| in bfloat16.
    """
    batch, rows_in, channels = x.shape
    stay, removed_count = kept.shape[1], removed.shape[1]
    out = x.new_empty(batch, rows_in + removed_count, channels)
    windows, sides, degree = 1, 0, kept
    if shares is None:
        assert places is not None, "recover needs shares, or places to make them from"
        places = places.contiguous()
        windows, _, sides = places.shape
        degree = _degrees(places)
    block = min(128, power_of_two(channels))
    rows, keys = (16, 16) if stay + removed_count <= 64 else (32, 32)
    programs = batch * (triton.cdiv(rows_in, rows) + triton.cdiv(removed_count, rows)) * triton.cdiv(channels, block)
    launcher(recover_kernel)[(programs,)](
        x, kept if shares is None else shares.contiguous(), kept if places is None else places, degree,
        x if residual is None else residual, kept, removed, out,
        *x.stride(), *(x if residual is None else residual).stride(),
        channels, prefix, stay, removed_count, suffix, windows, sides,
        HAS_SHARES=shares is not None, HAS_RESIDUAL=residual is not None,
        ROWS=rows, KEYS=keys, CHANNELS=block, num_warps=4,
    )  # fmt: skip
    return out


def _degrees(places_WnR: Tensor) -> Tensor:
    """Return how many neighbours each token has in its window, at least 1, as [W, n] float32."""
    steps_Wnn = (places_WnR[:, :, None] - places_WnR[:, None]).abs().amax(dim=-1)
    return steps_Wnn.eq(1).sum(dim=-1).clamp(min=1).float()


def _reference(x, shares, places, residual, kept, removed, prefix, suffix):  # type: ignore[no-untyped-def]
    """Return the same from the operators, for the gradients."""
    if shares is None:
        shares = region_shares(places, kept, removed)
    whole = recover_reference(x, shares, kept, removed, 0, 1, prefix, suffix)
    return (whole if residual is None else whole + residual,)


differentiable(recover, _reference)
