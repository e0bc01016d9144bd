"""Windows that rest: the cells that their tokens fall into, and what a cell's tokens get of its change.

R windows of n places each, G cells of a window, at most M places in a cell. An image has A windows that can rest and T
patches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gtp_fx.ops.register import operator


@operator(lambda rows_RnC, members_GM: rows_RnC.new_empty(rows_RnC.shape[0], members_GM.shape[0], rows_RnC.shape[2]))
def pool_cells(rows_RnC: Tensor, members_GM: Tensor) -> Tensor:
    """Return the mean of each cell's tokens, [R, G, C].

    members_GM: the places of each cell; -1 where it has fewer than M.
    """
    cells, most = members_GM.shape
    tokens_RGMC = rows_RnC.index_select(1, members_GM.clamp_min(0).flatten()).unflatten(1, (cells, most))
    inside_GM = members_GM >= 0
    # Shares are summed, since the sum of all may be more than half precision holds.
    share_G11 = (1.0 / inside_GM.sum(dim=1)).to(rows_RnC.dtype)[:, None, None]
    return torch.where(inside_GM[..., None], tokens_RGMC * share_G11, 0.0).sum(dim=2)


def _bias_shapes(members_GM, q, bias=None):  # type: ignore[no-untyped-def]
    cells = members_GM.shape[0]
    return q.new_empty(*(1,) * (q.dim() - 1), cells) if bias is None else q.new_empty(bias.shape)


@operator(_bias_shapes)
def cell_bias(members_GM: Tensor, q: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return an additive mask for keys that are cells: the log of how many places each one stands for, [..., G].

    So a query attends to a cell as much as to all of its places, were they what the cell is.

    members_GM: as above.
    q: the queries, of whose dtype it is and whose dimensions it has.
    bias: an additive mask, or one of booleans, that it is added to; None for none.
    """
    log_G = (members_GM >= 0).sum(dim=1).to(torch.float32).log().to(q.dtype)
    if bias is None:
        return log_G.reshape(*(1,) * (q.dim() - 1), -1)
    if bias.dtype == torch.bool:
        return torch.where(bias, log_G, float("-inf"))
    return bias + log_G


def _number_shapes(rank_BA, window_T, cell_T, patch_T, windows, cells, sides):  # type: ignore[no-untyped-def]
    return rank_BA.new_empty(rank_BA.numel() // windows * window_T.shape[0])


@operator(_number_shapes)
def cell_numbers(
    rank_BA: Tensor, window_T: Tensor, cell_T: Tensor, patch_T: Tensor, windows: int, cells: int, sides: list[int]
) -> Tensor:
    """Return which of the cells of all windows that rest each token is in, [B * T]; any where it is awake.

    rank_BA: which of the windows that rest each window is, from `window_ranks`; -1 where it is awake.
    window_T, cell_T: the window of each of an image's tokens, of those that can rest, and its cell in there; the cell
        is -1 in a window that can't.
    patch_T, sides: the number of each token on the image's grid, row by row, and that grid's sides. Pictures of what
        rests read them.
    windows, cells: A and G.
    """
    rank_BT = rank_BA.reshape(-1, windows).index_select(1, window_T)
    return (rank_BT * cells + cell_T).clamp_min(0).flatten()
