"""Propagation: x_kept + alpha * Â[kept, propagated] x_propagated (arXiv 2311.03035, token summarisation), and sums like it."""

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
    """The stream without its propagated tokens, whose share the kept ones received: a weighted sum, nothing is divided.

    x_BNC: [B, prefix + n + suffix, C], where what is neither prefix nor among the n = K + P patches is suffix. weights_BKP: from
    `propagation_weights`. kept_BK, propagated_BP: indices into the n patch tokens, from `select`. own_BK: what a kept token
    is multiplied by before it receives, as means ask; 1 where None.
    Returns [B, prefix + K + suffix, C]: the others untouched, kept tokens in their old order.
    """
    # The others are rows that receive nothing: one gather and one sum then cover the stream, and fuse with what follows.
    batch, tokens, leaving = x_BNC.shape[0], x_BNC.shape[1], propagated_BP.shape[1]
    behind = prefix + kept_BK.shape[1] + leaving
    ranges = [(0, prefix), (behind, tokens)] if behind < tokens else [(0, prefix)]
    rows = [torch.arange(*ends, device=x_BNC.device).expand(batch, ends[1] - ends[0]) for ends in ranges]
    nothing = [weights_BKP.new_zeros(batch, stop - start, leaving) for start, stop in ranges]
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
