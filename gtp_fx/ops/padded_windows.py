"""Windows that rest where some are padded: those without padding may, those with some are awake, patches alone leave.

B images of W windows each, n places of a window. A windows of an image hold no padding, E hold some. K = F + E windows
of each image are awake: F of the A, then all E. S = K * n places of them hold T patches.

Of these, only which of the A are awake follows the numbers of an image. All else follows from sizes, and is in tables
that `gtp_fx.passes.reduce.awake_windows` makes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gtp_fx.ops.register import operator


def _whole_shapes(x_BNC, patches_An):  # type: ignore[no-untyped-def]
    return x_BNC.new_empty(x_BNC.shape[0] * patches_An.shape[0], patches_An.shape[1], x_BNC.shape[2])


@operator(_whole_shapes)
def windows_without_padding(x_BNC: Tensor, patches_An: Tensor) -> Tensor:
    """Return the windows without padding of a stream, image by image, [B * A, n, C].

    patches_An: the numbers of the patches that each of them holds.
    """
    return x_BNC.index_select(1, patches_An.flatten()).reshape(-1, patches_An.shape[1], x_BNC.shape[2])


def _awake_shapes(kept_BF, able_A, padded_E):  # type: ignore[no-untyped-def]
    return kept_BF.new_empty(kept_BF.shape[0], kept_BF.shape[1] + padded_E.shape[0])


@operator(_awake_shapes)
def awake_of_padded(kept_BF: Tensor, able_A: Tensor, padded_E: Tensor) -> Tensor:
    """Return the numbers of the windows that are awake, [B, K]: those chosen of the ones without padding, all others.

    kept_BF: from `select`, which F of the A windows without padding are awake.
    able_A, padded_E: the numbers of the windows without padding, and of those with some.
    """
    return torch.cat([able_A[kept_BF], padded_E.expand(kept_BF.shape[0], -1)], dim=1)


def _patch_shapes(kept_BF, patches_An, edge_Q):  # type: ignore[no-untyped-def]
    return kept_BF.new_empty(kept_BF.shape[0], kept_BF.shape[1] * patches_An.shape[1] + edge_Q.shape[0])


@operator(_patch_shapes)
def awake_patches(kept_BF: Tensor, patches_An: Tensor, edge_Q: Tensor) -> Tensor:
    """Return the numbers of the patches in windows that are awake, [B, T].

    They are scattered into memory, so that whatever takes rows by them reads numbers. A compiler would write the two
    tables into each of these as index arithmetic otherwise, which is done anew for every feature.

    kept_BF, patches_An: as above.
    edge_Q: the numbers of the Q patches that windows with padding hold.
    """
    images = kept_BF.shape[0]
    whole = patches_An.index_select(0, kept_BF.flatten()).reshape(images, -1)
    held_BT = torch.cat([whole, edge_Q.expand(images, -1)], dim=1)
    into_BT = torch.arange(held_BT.shape[1], device=held_BT.device).expand_as(held_BT)
    return torch.empty_like(held_BT).scatter(1, into_BT, held_BT)


def _padded_shapes(x_BTC, held_S, each):  # type: ignore[no-untyped-def]
    return x_BTC.new_empty(x_BTC.shape[0] * (held_S.shape[0] // each), each, x_BTC.shape[2])


@operator(_padded_shapes)
def pad_windows(x_BTC: Tensor, held_S: Tensor, each: int) -> Tensor:
    """Bring patches to their places in the windows that are awake, with zeros for padding: [B * K, n, C].

    held_S: which of the T patches each place holds, -1 for padding.
    each: n.
    """
    there_BSC = x_BTC.index_select(1, held_S.clamp_min(0))
    return torch.where((held_S >= 0)[:, None], there_BSC, 0).reshape(-1, each, x_BTC.shape[2])


@operator(lambda x_RnC, places_T, awake: x_RnC.new_empty(x_RnC.shape[0] // awake, places_T.shape[0], x_RnC.shape[2]))
def crop_windows(x_RnC: Tensor, places_T: Tensor, awake: int) -> Tensor:
    """Return what patches got in their windows, [B, T, C]: the reverse of `pad_windows`.

    places_T: which of the S places hold patches.
    awake: K, of which an image has n places each among the rows R = B * K.
    """
    return x_RnC.reshape(-1, awake * x_RnC.shape[1], x_RnC.shape[2]).index_select(1, places_T)
