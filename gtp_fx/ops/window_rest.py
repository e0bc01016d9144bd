"""Windows that rest: how active each one is, and where those that are awake come from and go back to.

B images of W windows each, R = B * W rows of them, N tokens of a window, K windows of each image that are awake.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gtp_fx.ops.register import operator


def _activity_shapes(rows_RNC, windows):  # type: ignore[no-untyped-def]
    return rows_RNC.new_empty(rows_RNC.shape[0] // windows, windows, dtype=torch.float32)


@operator(_activity_shapes)
def window_activity(rows_RNC: Tensor, windows: int) -> Tensor:
    """Return how active each window is: how far its tokens are from their mean, on average. [B, W] in float32.

    A window whose tokens are all alike has least to tell them, whatever their length.

    windows: W.
    """
    tokens_RNC = rows_RNC.float()
    apart_RN = torch.linalg.vector_norm(tokens_RNC - tokens_RNC.mean(dim=1, keepdim=True), dim=-1)
    activity_BW: Tensor = apart_RN.mean(dim=-1).reshape(-1, windows)
    return activity_BW


@operator(lambda rows_RNC, patch_WN=None: rows_RNC.new_empty(rows_RNC.shape[:2], dtype=torch.float32))
def token_activity(rows_RNC: Tensor, patch_WN: Tensor | None = None) -> Tensor:
    """Return how active each token of a window is: how far it is from the mean of the window's tokens. [R, N], float32.

    patch_WN: which tokens of an image's windows are patches, where others are padding; the mean is over patches.
    """
    tokens_RNC = rows_RNC.float()
    if patch_WN is None:
        mean_R1C = tokens_RNC.mean(dim=1, keepdim=True)
    else:
        share_WN1 = (patch_WN / patch_WN.sum(dim=1, keepdim=True).clamp_min(1))[..., None]
        by_image_BWNC = tokens_RNC.reshape(-1, patch_WN.shape[0], *tokens_RNC.shape[1:])
        mean_R1C = (by_image_BWNC * share_WN1).sum(dim=2, keepdim=True).flatten(0, 1)
    activity_RN: Tensor = torch.linalg.vector_norm(tokens_RNC - mean_R1C, dim=-1)
    return activity_RN


def _row_shapes(awake_BK, windows):  # type: ignore[no-untyped-def]
    return awake_BK.new_empty(awake_BK.numel())


@operator(_row_shapes)
def awake_rows(awake_BK: Tensor, windows: int) -> Tensor:
    """Return the rows of the windows that are awake, image by image: [B * K].

    awake_BK: their numbers in each image, from `select`.
    windows: W.
    """
    return (awake_BK + _first(awake_BK, windows)).flatten()


def _rank_shapes(awake_BK, windows):  # type: ignore[no-untyped-def]
    return awake_BK.new_empty(awake_BK.shape[0] * windows)


@operator(_rank_shapes)
def window_ranks(awake_BK: Tensor, windows: int) -> Tensor:
    """Return which of the rows that are awake is each window's: [R]; -1 where it rests.

    awake_BK, windows: as in `awake_rows`.
    """
    awake = awake_BK.shape[1]
    rank_BK = torch.arange(awake, device=awake_BK.device) + _first(awake_BK, awake)
    resting_BW = awake_BK.new_full((awake_BK.shape[0], windows), -1)
    return resting_BW.scatter(1, awake_BK, rank_BK).flatten()


@operator(lambda rows, rank_R: rows.new_empty(rank_R.shape[0], *rows.shape[1:]))
def rows_at(rows: Tensor, rank_R: Tensor) -> Tensor:
    """Return the rows of these numbers, [R, …], any one for -1.

    An operator of its own: types take it for new values, where rows that are picked by numbers would be other tokens.

    rank_R: from `window_ranks`.
    """
    return rows.index_select(0, rank_R.clamp_min(0))


def _first(awake_BK: Tensor, each: int) -> Tensor:
    """Return the number of each image's first row, [B, 1]. each: how many rows an image has."""
    return torch.arange(awake_BK.shape[0], device=awake_BK.device)[:, None] * each
