"""Selection: which tokens are kept and which are removed (arXiv 2311.03035, token selection)."""

from __future__ import annotations

import torch
from torch import Tensor

from gtp_fx.ops.register import operator


def _shapes(score_BN: Tensor, propagated: int) -> tuple[Tensor, Tensor]:
    batch, tokens = score_BN.shape
    return (
        score_BN.new_empty(batch, tokens - propagated, dtype=torch.int64),
        score_BN.new_empty(batch, propagated, dtype=torch.int64),
    )


@operator(_shapes)
def select(score_BN: Tensor, propagated: int) -> tuple[Tensor, Tensor]:
    """Split patch tokens by score: the `propagated` lowest are removed, the others kept.

    score_BN: [B, n].
    propagated: P, how many to remove.

    Returns the kept [B, n - P] and the removed ones [B, P], as int64 indices into the n patch tokens, both ascending,
    so that tokens keep the grid's order. Of equal scores the last are removed first, on every device.
    """
    order_BN = score_BN.argsort(dim=1, descending=True, stable=True)
    stay = score_BN.shape[1] - propagated
    return order_BN[:, :stay].sort(dim=1).values, order_BN[:, stay:].sort(dim=1).values
