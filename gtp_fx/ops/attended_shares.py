"""Shares by which removed tokens are recovered: attention of theirs over the tokens that are left (STViT-R)."""

from __future__ import annotations

import torch
from torch import Tensor

from gtp_fx.ops.autocast import without_autocast
from gtp_fx.ops.register import operator


def _shapes(q_BHND, k_BHMD, removed_BP, prefix, suffix, scale=None):  # type: ignore[no-untyped-def]
    kept = k_BHMD.shape[2] - prefix - suffix
    return removed_BP.new_empty(*removed_BP.shape, kept, dtype=torch.float32)


@operator(_shapes)
def attended_shares(
    q_BHND: Tensor, k_BHMD: Tensor, removed_BP: Tensor, prefix: int, suffix: int, scale: float | None = None
) -> Tensor:
    """Compute the shares of the kept patches in each removed one: softmax(q·kᵀ·scale), the mean over heads.

    q_BHND: queries of all N = prefix + n + suffix tokens that a site had.
    k_BHMD: keys of the M = prefix + K + suffix that it left.
    removed_BP: indices of the P = n - K removed patches among the n.
    prefix, suffix: tokens before and after the patches, over which nothing attends here.
    scale: of the logits; D^-1/2 where None.

    Returns [B, P, K] in float32; rows sum to 1.
    """
    heads, features = q_BHND.shape[1], q_BHND.shape[3]
    rows_BP = removed_BP + prefix
    q_BHPD = q_BHND.gather(2, rows_BP[:, None, :, None].expand(-1, heads, -1, features))
    k_BHKD = k_BHMD.narrow(2, prefix, k_BHMD.shape[2] - prefix - suffix)
    with without_autocast(q_BHND):
        logits_BHPK = torch.matmul(q_BHPD, k_BHKD.transpose(-2, -1)).float()
    return (logits_BHPK * (features**-0.5 if scale is None else scale)).softmax(dim=-1).mean(dim=1)
