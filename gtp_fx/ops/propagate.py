"""Propagation: x_kept + alpha * Â[kept, removed] x_removed (arXiv 2311.03035, token summarisation), and the like."""

from __future__ import annotations

import torch
from torch import Tensor

from gtp_fx.ops.autocast import without_autocast
from gtp_fx.ops.register import operator


def _shapes(x_BNC, weights_BKP, kept_BK, propagated_BP, alpha, prefix, own_BK=None):  # type: ignore[no-untyped-def]
    return x_BNC.new_empty(x_BNC.shape[0], x_BNC.shape[1] - propagated_BP.shape[1], x_BNC.shape[2])


@operator(_shapes)
def propagate(
    x_BNC: Tensor,
    weights_BKP: Tensor,
    kept_BK: Tensor,
    propagated_BP: Tensor,
    alpha: float,
    prefix: int,
    own_BK: Tensor | None = None,
) -> Tensor:
    """Remove tokens from a stream and add their share to the kept ones: a weighted sum, divided by nothing.

    x_BNC: [B, prefix + n + suffix, C]; whatever follows the n = K + P patches is suffix.
    weights_BKP: from `propagation_weights`.
    kept_BK, propagated_BP: indices into the n patch tokens, from `select`.
    alpha: factor of what is received.
    prefix: tokens before the patches.
    own_BK: factor of a kept token before it receives, as means need; 1 where None.

    Returns [B, prefix + K + suffix, C]: kept tokens in their old order, prefix and suffix tokens unchanged.
    """
    # Prefix and suffix tokens are rows that receive nothing: one gather and one sum then cover the whole stream,
    # and fuse with what follows.
    batch, tokens, removed = x_BNC.shape[0], x_BNC.shape[1], propagated_BP.shape[1]
    patches_end = prefix + kept_BK.shape[1] + removed
    ranges = [(0, prefix), (patches_end, tokens)] if patches_end < tokens else [(0, prefix)]
    rows = [torch.arange(*ends, device=x_BNC.device).expand(batch, ends[1] - ends[0]) for ends in ranges]
    nothing = [weights_BKP.new_zeros(batch, stop - start, removed) for start, stop in ranges]
    staying_BK = torch.cat([rows[0], kept_BK + prefix, *rows[1:]], dim=1)
    weights_BKP = torch.cat([nothing[0], weights_BKP, *nothing[1:]], dim=1).to(x_BNC.dtype)
    with without_autocast(x_BNC):
        received_BKC = torch.matmul(weights_BKP, _rows(x_BNC, propagated_BP + prefix))
    staying_BKC = _rows(x_BNC, staying_BK)
    if own_BK is not None:
        ones = [own_BK.new_ones(batch, stop - start) for start, stop in ranges]
        staying_BKC = staying_BKC * torch.cat([ones[0], own_BK, *ones[1:]], dim=1)[..., None].to(x_BNC.dtype)
    return staying_BKC + alpha * received_BKC


def _rows(x_BNC: Tensor, index_BK: Tensor) -> Tensor:
    return x_BNC.gather(1, index_BK[..., None].expand(-1, -1, x_BNC.shape[-1]))
