"""Average pooling in which a token is weighted by how many original ones it stands for."""

from __future__ import annotations

import torch
from torch import Tensor

from gtp_fx.ops.register import operator


def _shapes(x, scale_BN, images, tokens, prefix, suffix, keepdim):  # type: ignore[no-untyped-def]
    shape = [*x.shape[:tokens], *([1] if keepdim else []), *x.shape[tokens + 1 :]]
    return x.new_empty(shape)


@operator(_shapes)
def weighted_mean(
    x: Tensor, scale_BN: Tensor, images: int, tokens: int, prefix: int, suffix: int, keepdim: bool
) -> Tensor:
    """Average x over its dimension `tokens`, weighted by the token scales; tokens that are no patches weigh 1.

    x: any rank.
    scale_BN: [B, n] token scales of the patches.
    images: the dimension of the B images.
    tokens: the dimension of the tokens, of size prefix + n + suffix.
    prefix, suffix: tokens before and after the patches.
    keepdim: keep the averaged dimension, with size 1.
    """
    ones = [scale_BN.new_ones(scale_BN.shape[0], count) for count in (prefix, suffix)]
    weights_BN = torch.cat([ones[0], scale_BN, ones[1]], dim=1)
    weights_BN = (weights_BN / weights_BN.sum(dim=1, keepdim=True)).to(x.dtype)
    x_BN = x.movedim((images, tokens), (0, 1))
    weighted = x_BN * weights_BN.reshape(*weights_BN.shape, *(1 for _ in x_BN.shape[2:]))
    return weighted.movedim((0, 1), (images, tokens)).sum(dim=tokens, keepdim=keepdim)
