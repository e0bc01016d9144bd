"""Changes of level: `take_tokens` to a newer one, `recover` to the one before, `put_back` and `idle` to all tokens.

`stand_ins` says which of the remaining tokens stands for which patch. `take_tokens` and `recover` work on any value
that runs over a stream's tokens, wherever its token axis is: a residual stream [B, N, C], a rotary table [1, 1, N, D],
one side of a relative-position bias [1, H, N, N]. Their arguments `images` and `tokens` say which dimensions those are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gtp_fx.ops.autocast import without_autocast
from gtp_fx.ops.register import operator
from gtp_fx.ops.token_graph import coordinates, taken_places


def _taken_shapes(x, index_BK, images, tokens, prefix, suffix):  # type: ignore[no-untyped-def]
    inner = _tokens_first(x, images, tokens).shape[2:]
    shape = (index_BK.shape[0], prefix + index_BK.shape[1] + suffix, *inner)
    return _tokens_back(x.new_empty(shape), images, tokens)


def _share_shapes(weights_BKP, kept_BK, propagated_BP, grid, places_BGR=None):  # type: ignore[no-untyped-def]
    return kept_BK.new_empty(*propagated_BP.shape, kept_BK.shape[1], dtype=torch.float32)


def _recovered_shapes(x, shares_BPK, kept_BK, propagated_BP, images, tokens, prefix, suffix):  # type: ignore[no-untyped-def]
    batch, count, *inner = _tokens_first(x, images, tokens).shape
    return _tokens_back(x.new_empty(batch, count + propagated_BP.shape[1], *inner), images, tokens)


@operator(_taken_shapes)
def take_tokens(x: Tensor, index_BK: Tensor, images: int, tokens: int, prefix: int, suffix: int) -> Tensor:
    """Take the remaining tokens of `x`: patches by their index, and all prefix and suffix tokens.

    x: any rank.
    index_BK: the remaining ones of the n patches.
    images: the dimension of the images, of size B, or of size 1 for a value that all images share.
    tokens: the dimension of the tokens, of size prefix + n + suffix.
    prefix, suffix: tokens before and after the patches.

    Returns x's shape with B images and prefix + K + suffix tokens.
    """
    x_BN = _tokens_first(x, images, tokens)
    batch, count = index_BK.shape[0], x_BN.shape[1]
    before = torch.arange(prefix, device=x.device).expand(batch, prefix)
    after = torch.arange(count - suffix, count, device=x.device).expand(batch, suffix)
    rows_BK = torch.cat([before, index_BK + prefix, after], dim=1)
    inner = x_BN.shape[2:]
    rows = rows_BK.reshape(*rows_BK.shape, *(1 for _ in inner)).expand(*rows_BK.shape, *inner)
    return _tokens_back(x_BN.expand(batch, *x_BN.shape[1:]).gather(1, rows), images, tokens)


@operator(_share_shapes)
def recovery_weights(
    weights_BKP: Tensor | None,
    kept_BK: Tensor,
    propagated_BP: Tensor,
    grid: list[int],
    places_BGR: Tensor | None = None,
) -> Tensor:
    """Compute the shares of the kept tokens in each recovered one: [B, P, K] in float32; rows sum to 1.

    A removed token comes back as the mean of those that received it, weighted by how much they received: the edges that
    it was propagated along. One that nobody received (all its neighbours were removed with it) becomes the kept token
    that is nearest on the grid.

    weights_BKP: from `propagation_weights`; None where nothing of the removed tokens was kept.
    kept_BK, propagated_BP: indices of the kept and the removed patches into the whole grid.
    grid: the grid's sides in patches.
    places_BGR: as in `token_graph`; kept_BK and propagated_BP are then indices into all patches of the stream.
    """
    if weights_BKP is None:
        weights_BKP = kept_BK.new_zeros(*kept_BK.shape, propagated_BP.shape[1], dtype=torch.float32)
    received_BPK = weights_BKP.transpose(1, 2)
    total_BP1 = received_BPK.sum(dim=-1, keepdim=True)
    here_BGR = coordinates(grid, kept_BK.device)[None] if places_BGR is None else places_BGR
    offset_BPKR = taken_places(here_BGR, propagated_BP)[:, :, None] - taken_places(here_BGR, kept_BK)[:, None, :]
    nearest_BP1 = offset_BPKR.square().sum(dim=-1).argmin(dim=-1, keepdim=True)
    nearest_BPK = torch.arange(kept_BK.shape[1], device=kept_BK.device) == nearest_BP1
    lonely_BP1 = total_BP1 == 0
    return torch.where(
        lonely_BP1, nearest_BPK.to(received_BPK.dtype), received_BPK / total_BP1.masked_fill(lonely_BP1, 1.0)
    )


@operator(_recovered_shapes)
def recover(
    x: Tensor,
    shares_BPK: Tensor,
    kept_BK: Tensor,
    propagated_BP: Tensor,
    images: int,
    tokens: int,
    prefix: int,
    suffix: int,
) -> Tensor:
    """Undo one site: kept tokens return to their places, and removed ones become a weighted mean of the kept.

    x: any rank.
    shares_BPK: from `recovery_weights`.
    kept_BK, propagated_BP: from `select`, indices into the n = K + P patches that the site had.
    images: the dimension of the B images.
    tokens: the dimension of the tokens, of size prefix + K + suffix.
    prefix, suffix: tokens before and after the patches.

    Returns x's shape with prefix + n + suffix tokens.
    """
    x_BN = _tokens_first(x, images, tokens)
    batch, count, inner = x_BN.shape[0], x_BN.shape[1], x_BN.shape[2:]
    patches_BKC = x_BN[:, prefix : count - suffix].flatten(2) if inner else x_BN[:, prefix : count - suffix, None]
    with without_autocast(x):
        back_BPC = torch.matmul(shares_BPK.to(x.dtype), patches_BKC)
    # The place of each patch in [kept, removed] is the inverse of that order.
    place_Bn = torch.cat([kept_BK, propagated_BP], dim=1).argsort(dim=1)
    patches_BnC = torch.cat([patches_BKC, back_BPC], dim=1)
    patches_BnC = patches_BnC.gather(1, place_Bn[..., None].expand(-1, -1, patches_BnC.shape[-1]))
    patches_Bn = patches_BnC.reshape(batch, patches_BnC.shape[1], *inner)
    whole_Bn = torch.cat([x_BN[:, :prefix], patches_Bn, x_BN[:, count - suffix :]], dim=1)
    return _tokens_back(whole_Bn, images, tokens)


def _stand_in_shapes(weights_BKP, kept_BK, propagated_BP, index_Bn, grid, places_BGR=None):  # type: ignore[no-untyped-def]
    whole = math.prod(map(abs, grid)) if places_BGR is None else places_BGR.shape[1]
    return kept_BK.new_empty(kept_BK.shape[0], whole if index_Bn is None else index_Bn.shape[1])


@operator(_stand_in_shapes)
def stand_ins(
    weights_BKP: Tensor | None,
    kept_BK: Tensor,
    propagated_BP: Tensor | None,
    index_Bn: Tensor | None,
    grid: list[int],
    places_BGR: Tensor | None = None,
) -> Tensor:
    """Number the kept token that stands for each patch that a site had: [B, n], from 0 to K - 1.

    A kept one stands for itself. A removed one is stood for by the token that received most of it, or, where none did,
    by the kept one that is nearest on the grid.

    weights_BKP: as in `recovery_weights`.
    kept_BK, propagated_BP: from `select`, indices into the n patches that the site had; propagated_BP is read with
        weights alone.
    index_Bn: those patches among all of the stream; None where they are all.
    grid: the grid's sides in patches.
    places_BGR: as in `token_graph`.
    """
    here_BGR = coordinates(grid, kept_BK.device)[None] if places_BGR is None else places_BGR
    if index_Bn is None:
        index_Bn = torch.arange(here_BGR.shape[1], device=kept_BK.device).expand(kept_BK.shape[0], -1)
    here_BnR, kept_BKR = taken_places(here_BGR, index_Bn), taken_places(here_BGR, index_Bn.gather(1, kept_BK))
    nearest_Bn = (here_BnR[:, :, None] - kept_BKR[:, None]).square().sum(dim=-1).argmin(dim=-1)
    if weights_BKP is None or propagated_BP is None:
        return nearest_Bn
    most_BP, receiver_BP = weights_BKP.max(dim=1)
    return nearest_Bn.scatter(
        1, propagated_BP, torch.where(most_BP > 0, receiver_BP, nearest_Bn.gather(1, propagated_BP))
    )


def _put_back_shapes(whole_BNC, x_BKC, index_BK, prefix, suffix):  # type: ignore[no-untyped-def]
    return torch.empty_like(whole_BNC)


@operator(_put_back_shapes)
def put_back(whole_BNC: Tensor, x_BKC: Tensor, index_BK: Tensor, prefix: int, suffix: int) -> Tensor:
    """Replace the tokens of a whole stream that took part in some blocks; the rest stay as they were.

    whole_BNC: [B, prefix + G + suffix, C].
    x_BKC: [B, prefix + K + suffix, C], the tokens that took part.
    index_BK: their places among the G patches.
    prefix, suffix: tokens before and after the patches.

    Returns [B, prefix + G + suffix, C].
    """
    batch, count, channels = whole_BNC.shape
    before = torch.arange(prefix, device=whole_BNC.device).expand(batch, prefix)
    after = torch.arange(count - suffix, count, device=whole_BNC.device).expand(batch, suffix)
    rows_BK = torch.cat([before, index_BK + prefix, after], dim=1)
    return whole_BNC.scatter(1, rows_BK[..., None].expand(-1, -1, channels), x_BKC)


def _idle_shapes(x_BKC, places_WnR, kept_BK, skipped_BP, prefix, suffix, mean=0.0, padded=False):  # type: ignore[no-untyped-def]
    return x_BKC.new_empty(x_BKC.shape[0], x_BKC.shape[1] + skipped_BP.shape[1], x_BKC.shape[2])


@operator(_idle_shapes)
def idle(
    x_BKC: Tensor,
    places_WnR: Tensor,
    kept_BK: Tensor,
    skipped_BP: Tensor,
    prefix: int,
    suffix: int,
    mean: float = 0.0,
    padded: bool = False,
) -> Tensor:
    """Return a branch's results with every token in its place.

    Those that skipped it get a share of the mean result of their window's kept patches, or nothing (zeros).

    x_BKC: [B, prefix + K + suffix, C], the results; B = images * W.
    places_WnR: as in `region_shares`, negative where there is padding. Pictures of what was skipped read it, too.
    kept_BK, skipped_BP: from `select`, indices into the n = K + P patches.
    prefix, suffix: tokens before and after the patches.
    mean: the share, from 0 (nothing) to 1 (the mean).
    padded: whether windows contain padding, which counts in no mean.

    Returns [B, prefix + n + suffix, C].
    """
    batch, count, channels = x_BKC.shape
    whole = (batch, count + skipped_BP.shape[1], channels)
    if not mean:
        return put_back(x_BKC.new_zeros(whole), x_BKC, kept_BK, prefix, suffix)  # type: ignore[no-any-return]
    patches_BKC = x_BKC.narrow(1, prefix, kept_BK.shape[1])
    if padded:
        inside_Wn = places_WnR[..., 0] >= 0
        inside_BK = inside_Wn.repeat(batch // inside_Wn.shape[0], 1).gather(1, kept_BK)
        # A window that lies in the padding as a whole has no mean, and nothing reads what its tokens get. Shares are
        # summed, since the sum of all may be more than half precision holds.
        share_B11 = (1.0 / inside_BK.sum(dim=1).clamp(min=1)).to(x_BKC.dtype)[:, None, None]
        mean_B1C = torch.where(inside_BK[..., None], patches_BKC * share_B11, 0.0).sum(dim=1, keepdim=True)
    else:
        mean_B1C = patches_BKC.mean(dim=1, keepdim=True)
    return put_back((mean_B1C * mean).expand(whole), x_BKC, kept_BK, prefix, suffix)  # type: ignore[no-any-return]


def _tokens_first(x: Tensor, images: int, tokens: int) -> Tensor:
    """Move the dimensions of images and tokens to the front: [B, N, …]."""
    return x.movedim((images, tokens), (0, 1))


def _tokens_back(x_BN: Tensor, images: int, tokens: int) -> Tensor:
    """Undo `_tokens_first`."""
    return x_BN.movedim((0, 1), (images, tokens))
