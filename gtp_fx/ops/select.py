"""Which tokens stay, which are propagated (arXiv 2311.03035, token selection)."""

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
    """Split patch tokens by score: the `propagated` lowest leave, the others stay.

    score_BN: [B, n]. Returns kept [B, n - P] and propagated [B, P], int64 indices into the n patch tokens, both
    ascending, so that the tokens keep the order of the grid. Equal scores leave from the back, on every device.
    """
    order_BN = score_BN.argsort(dim=1, descending=True, stable=True)
    stay = score_BN.shape[1] - propagated
    return order_BN[:, :stay].sort(dim=1).values, order_BN[:, stay:].sort(dim=1).values
