"""Windows that rest where some are padded: those without padding may, those with some are awake, patches alone leave.

B images of W windows each, n places of a window, `whole` windows of an image without padding. K windows of each image
are awake: some of those without padding, then all others. S = K * n places of them hold T patches. N patches of an
image. home_Wn says which of them each place of a window holds, -1 for padding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gtp_fx.ops.register import operator
from gtp_fx.ops.select import select


@operator(lambda grid, like: like.new_empty(1, *map(abs, grid), 1, dtype=torch.int64))
def grid_numbers(grid: list[int], like: Tensor) -> Tensor:
    """Return the number of every patch, from 1, [1, *grid, 1], on the device of `like`.

    grid: the grid's sides, as in `token_graph`.
    """
    count = math.prod(map(abs, grid))
    return torch.arange(1, count + 1, device=like.device).reshape(1, *map(abs, grid), 1)


@operator(lambda placed_Wn1: placed_Wn1.new_empty(placed_Wn1.shape[:2]))
def homes(placed_Wn1: Tensor) -> Tensor:
    """Return home_Wn from `grid_numbers` by window, where padding is 0.

    It is scattered into memory, so that whatever takes rows by it reads numbers. A compiler would write the padding and
    the windows into each of these as index arithmetic otherwise, which is done anew for every feature.
    """
    home_S = placed_Wn1.flatten() - 1
    places_S = torch.arange(home_S.shape[0], device=home_S.device)
    return torch.empty_like(home_S).scatter(0, places_S, home_S).reshape(placed_Wn1.shape[:2])


def _whole_shapes(x_BNC, home_Wn, whole):  # type: ignore[no-untyped-def]
    return x_BNC.new_empty(x_BNC.shape[0] * whole, home_Wn.shape[1], x_BNC.shape[2])


@operator(_whole_shapes)
def windows_without_padding(x_BNC: Tensor, home_Wn: Tensor, whole: int) -> Tensor:
    """Return the windows without padding of a stream, image by image, [B * whole, n, C]."""
    patches = home_Wn.index_select(0, _whole_first(home_Wn)[:whole]).flatten()
    return x_BNC.index_select(1, patches).reshape(-1, home_Wn.shape[1], x_BNC.shape[2])


def _awake_shapes(activity_BW, home_Wn, whole, resting):  # type: ignore[no-untyped-def]
    return home_Wn.new_empty(activity_BW.shape[0], home_Wn.shape[0] - resting)


@operator(_awake_shapes)
def awake_of_padded(activity_BW: Tensor, home_Wn: Tensor, whole: int, resting: int) -> Tensor:
    """Return the numbers of the windows that are awake, [B, K]: the most active ones without padding, then the others.

    activity_BW: `window_activity` of those without padding, [B, whole].
    resting: how many windows of an image rest.
    """
    order_W = _whole_first(home_Wn)
    kept_BK, _ = select(activity_BW, resting)
    padded_BE = order_W[whole:].expand(activity_BW.shape[0], -1)
    return torch.cat([order_W[kept_BK], padded_BE], dim=1)


def _place_shapes(home_Wn, whole, resting, tokens):  # type: ignore[no-untyped-def]
    return home_Wn.new_empty(tokens)


@operator(_place_shapes)
def places_of_patches(home_Wn: Tensor, whole: int, resting: int, tokens: int) -> Tensor:
    """Return which of the S places of the windows that are awake hold patches, [T]; the same for every image.

    tokens: T.
    """
    padded_En = home_Wn.index_select(0, _whole_first(home_Wn)[whole:])
    full = (whole - resting) * home_Wn.shape[1]
    edge = (padded_En.flatten() < 0).to(torch.uint8).argsort(stable=True)[: tokens - full] + full
    return torch.cat([torch.arange(full, device=home_Wn.device), edge])


@operator(lambda home_Wn, awake_BK, places_T: awake_BK.new_empty(awake_BK.shape[0], places_T.shape[0]))
def awake_patches(home_Wn: Tensor, awake_BK: Tensor, places_T: Tensor) -> Tensor:
    """Return the numbers of the patches in windows that are awake, [B, T].

    places_T: from `places_of_patches`.
    """
    windows_BKn = home_Wn.index_select(0, awake_BK.flatten()).reshape(*awake_BK.shape, -1)
    held_BT = windows_BKn.flatten(1).index_select(1, places_T)
    into_BT = torch.arange(held_BT.shape[1], device=held_BT.device).expand_as(held_BT)
    return torch.empty_like(held_BT).scatter(1, into_BT, held_BT)  # into memory, as in `homes`


def _padded_shapes(x_BTC, places_T, awake, each):  # type: ignore[no-untyped-def]
    return x_BTC.new_empty(x_BTC.shape[0] * awake, each, x_BTC.shape[2])


@operator(_padded_shapes)
def pad_windows(x_BTC: Tensor, places_T: Tensor, awake: int, each: int) -> Tensor:
    """Bring patches to their places in the windows that are awake, with zeros for padding: [B * K, n, C].

    places_T: from `places_of_patches`.
    awake: K.
    each: n.
    """
    held_S = places_T.new_full((awake * each,), -1)
    held_S = held_S.scatter(0, places_T, torch.arange(places_T.shape[0], device=places_T.device))
    there_BSC = x_BTC.index_select(1, held_S.clamp_min(0))
    return torch.where((held_S >= 0)[:, None], there_BSC, 0).reshape(-1, each, x_BTC.shape[2])


@operator(lambda x_RnC, places_T, awake: x_RnC.new_empty(x_RnC.shape[0] // awake, places_T.shape[0], x_RnC.shape[2]))
def crop_windows(x_RnC: Tensor, places_T: Tensor, awake: int) -> Tensor:
    """Return what patches got in their windows, [B, T, C]: the reverse of `pad_windows`.

    awake: K, of which an image has n places each among the rows R = B * K.
    """
    return x_RnC.reshape(-1, awake * x_RnC.shape[1], x_RnC.shape[2]).index_select(1, places_T)


def _whole_first(home_Wn: Tensor) -> Tensor:
    """Return the numbers of an image's windows, those without padding first, [W]."""
    return (home_Wn < 0).any(dim=1).to(torch.uint8).argsort(stable=True)
