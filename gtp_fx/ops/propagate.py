"""Propagation: x_kept + alpha * Â[kept, propagated] x_propagated (paper, equation 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from gtp_fx.ops.register import operator


def _shapes(x_BNC, weights_BKP, kept_BK, propagated_BP, alpha, prefix):  # type: ignore[no-untyped-def]
    return x_BNC.new_empty(x_BNC.shape[0], prefix + kept_BK.shape[1], x_BNC.shape[2])


@operator(_shapes)
def propagate(
    x_BNC: Tensor, weights_BKP: Tensor, kept_BK: Tensor, propagated_BP: Tensor, alpha: float, prefix: int
) -> Tensor:
    """The stream without its propagated tokens, whose share the kept ones received: a weighted sum, nothing is divided.

    x_BNC: [B, prefix + n, C]. weights_BKP: from `propagation_weights`. kept_BK, propagated_BP: indices into the n patch
    tokens, from `select`. Returns [B, prefix + K, C]: prefix tokens untouched, kept tokens in their old order.
    """
    leaving_BPC = _rows(x_BNC, propagated_BP + prefix)
    staying_BKC = _rows(x_BNC, kept_BK + prefix)
    received_BKC = torch.baddbmm(staying_BKC, weights_BKP.to(x_BNC.dtype), leaving_BPC, alpha=alpha)
    return torch.cat([x_BNC[:, :prefix], received_BKC], dim=1) if prefix else received_BKC


def _rows(x_BNC: Tensor, index_BK: Tensor) -> Tensor:
    return x_BNC.gather(1, index_BK[..., None].expand(-1, -1, x_BNC.shape[-1]))
