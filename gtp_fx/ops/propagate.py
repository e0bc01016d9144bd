"""Propagation: x_kept + alpha * Â[kept, propagated] x_propagated (arXiv 2311.03035, token summarisation)."""

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
    # Prefix tokens are rows that receive nothing: one gather and one sum then cover the stream, and fuse with what follows.
    first_B = torch.arange(prefix, device=x_BNC.device).expand(x_BNC.shape[0], prefix)
    staying_BK = torch.cat([first_B, kept_BK + prefix], dim=1)
    nothing_BpP = weights_BKP.new_zeros(x_BNC.shape[0], prefix, propagated_BP.shape[1])
    weights_BKP = torch.cat([nothing_BpP, weights_BKP], dim=1).to(x_BNC.dtype)
    received_BKC = torch.matmul(weights_BKP, _rows(x_BNC, propagated_BP + prefix))
    return _rows(x_BNC, staying_BK) + alpha * received_BKC


def _rows(x_BNC: Tensor, index_BK: Tensor) -> Tensor:
    return x_BNC.gather(1, index_BK[..., None].expand(-1, -1, x_BNC.shape[-1]))
