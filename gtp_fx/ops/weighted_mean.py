"""Average pooling in which a token counts as many times as it stands for original ones."""

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
    """The mean of x over its dimension `tokens`, weighted by the token scales; tokens that are no patches weigh 1.

    x: any rank, B images in dimension `images`, prefix + n + suffix tokens in dimension `tokens`. scale_BN: [B, n].
    """
    ones = [scale_BN.new_ones(scale_BN.shape[0], count) for count in (prefix, suffix)]
    weights_BN = torch.cat([ones[0], scale_BN, ones[1]], dim=1)
    weights_BN = (weights_BN / weights_BN.sum(dim=1, keepdim=True)).to(x.dtype)
    x_BN = x.movedim((images, tokens), (0, 1))
    weighted = x_BN * weights_BN.reshape(*weights_BN.shape, *(1 for _ in x_BN.shape[2:]))
    return weighted.movedim((0, 1), (images, tokens)).sum(dim=tokens, keepdim=keepdim)
