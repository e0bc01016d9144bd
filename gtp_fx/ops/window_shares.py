"""Windows whose tokens skip a branch: the shares of the kept tokens in each skipping one's result."""

from __future__ import annotations

import torch
from torch import Tensor

from gtp_fx.ops.register import operator
from gtp_fx.ops.token_graph import coordinates


def _share_shapes(places_WnR, kept_BK, propagated_BP):  # type: ignore[no-untyped-def]
    shape = (kept_BK.shape[0], propagated_BP.shape[1], kept_BK.shape[1])
    return kept_BK.new_empty(shape, dtype=torch.float32)


@operator(_share_shapes)
def region_shares(places_WnR: Tensor, kept_BK: Tensor, propagated_BP: Tensor) -> Tensor:
    """Compute the shares of a window's kept tokens in each skipping one: [B, P, K] in float32; rows sum to 1.

    This is `recovery_weights` along the edges of the spatial graph. Edges join tokens that touch on the image, corners
    included, and weigh 1/sqrt of the kept token's degree in the window. A token without an edge gets the nearest kept
    token. A window that was rolled over the image's border has tokens from opposite ends of the image side by side, so
    places are the image's and not the window's.

    places_WnR: rows and columns of the n tokens of each of an image's W windows.
    kept_BK, propagated_BP: from `select`, indices into the n tokens; B = images * W.
    """
    touching_Wnn = _apart(places_WnR, places_WnR).eq(1)
    degree_Wn = touching_Wnn.sum(dim=-1).clamp(min=1).float()
    windows = places_WnR.shape[0]
    # Each image has the same windows: [I * W, …] indices become [I, W, …] beside the windows' places.
    kept_IWK, propagated_IWP = (index.unflatten(0, (-1, windows)) for index in (kept_BK, propagated_BP))
    here_IWKR, there_IWPR = _rows(places_WnR, kept_IWK), _rows(places_WnR, propagated_IWP)
    weight_IWK = degree_Wn.rsqrt().expand(kept_IWK.shape[0], -1, -1).gather(2, kept_IWK)
    edge_IWPK = _apart(there_IWPR, here_IWKR).eq(1)
    received_IWPK = torch.where(edge_IWPK, weight_IWK[:, :, None, :], 0.0)
    total_IWP1 = received_IWPK.sum(dim=-1, keepdim=True)
    # A token that no kept one touches gets the nearest of them.
    square_IWPK = (there_IWPR[..., :, None, :] - here_IWKR[..., None, :, :]).square().sum(dim=-1)
    nearest_IWPK = torch.arange(kept_BK.shape[1], device=kept_BK.device) == square_IWPK.argmin(dim=-1, keepdim=True)
    lonely_IWP1 = total_IWP1 == 0
    shares_IWPK = torch.where(
        lonely_IWP1, nearest_IWPK.to(received_IWPK.dtype), received_IWPK / total_IWP1.masked_fill(lonely_IWP1, 1.0)
    )
    return shares_IWPK.flatten(0, 1)


def _place_shapes(grid, like):  # type: ignore[no-untyped-def]
    return like.new_empty(1, *map(abs, grid), len(grid), dtype=torch.int64)


@operator(_place_shapes)
def grid_places(grid: list[int], like: Tensor) -> Tensor:
    """Return the row and column (and so on) of every patch, [1, *grid, R], on the device of `like`.

    grid: the grid's sides, as in `token_graph`.
    """
    return coordinates(grid, like.device).reshape(1, *map(abs, grid), len(grid))


def _apart(a_R: Tensor, b_R: Tensor) -> Tensor:
    """Return how far apart places are, the larger of rows and columns: […, P, R] and […, K, R] -> […, P, K]."""
    return (a_R[..., :, None, :] - b_R[..., None, :, :]).abs().amax(dim=-1)


def _rows(places_WnR: Tensor, index_IWK: Tensor) -> Tensor:
    """Take rows of each window's places by index."""
    sides = places_WnR.shape[-1]
    places_IWnR = places_WnR.expand(index_IWK.shape[0], *places_WnR.shape)
    return places_IWnR.gather(2, index_IWK[..., None].expand(*index_IWK.shape, sides))
