"""What a lowered graph asks of torch's own attention: its log-sum-exp, and token scales where it takes no mask.

`torch.nn.functional.scaled_dot_product_attention` returns one tensor; the operators behind it return each row's log-sum-exp too,
from which a kernel makes scores without a map in memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.ops.attention import key_bias
from gtp_fx.ops.register import operator

CHANNELS = 8
"""By which a head grows to tell scales: fused attention asks for multiples of it."""


def _lse_shapes(*arguments):  # type: ignore[no-untyped-def]
    return attention_with_lse(
        *arguments
    )  # each kernel's output lies in memory in a way of its own, which its fake knows


@operator(_lse_shapes)
def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None, kernel: str
) -> tuple[Tensor, Tensor]:
    """Stock attention by a kernel of torch's, and the natural logarithm of each row's sum of exponentials.

    q [B, H, M, D], k [B, H, N, D], v [B, H, N, E]. bias: additive, in q's dtype, broadcasts to [B, H, M, N]; flash attention on a GPU takes
    none. scale: None for D**-0.5. kernel: "cudnn", "flash" or "cpu", as `gtp_fx.kernels.stock_attention` chooses.
    Returns the output [B, H, M, E], and [B, H, M] float32, which has no gradient.
    """
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        # The kernels have no gradient for a mask, and a strategy's own token scales may want one: then torch chooses another.
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        with torch.no_grad():
            lse_BHM = (torch.matmul(q, k.transpose(-2, -1)).float() * scale + bias).logsumexp(dim=-1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale), lse_BHM
    if kernel == "cudnn":
        out, lse_BHM1, *_ = aten._scaled_dot_product_cudnn_attention.default(q, k, v, bias, True, scale=scale)
        return out, lse_BHM1.squeeze(-1)
    if kernel == "flash":
        out, lse_BHM, *_ = aten._scaled_dot_product_flash_attention.default(q, k, v, scale=scale)
        return out, lse_BHM
    out, lse_BHM = aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, attn_mask=bias, scale=scale)
    return out, lse_BHM


def _channel_shapes(q, k, scale_BN, prefix, suffix, scale):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(*x.shape[:-1], x.shape[-1] + CHANNELS) for x in (q, k))


@operator(_channel_shapes)
def scale_channels(
    q: Tensor, k: Tensor, scale_BN: Tensor, prefix: int, suffix: int, scale: float
) -> tuple[Tensor, Tensor]:
    """q and k with `CHANNELS` more features, whose product is log s_j on the logits of key j: token scales without a mask.

    q [B, H, M, D], k [B, H, N, D]. scale_BN: token scales [B, n] of the N = prefix + n + suffix keys. scale: by which attention multiplies logits.
    A key has log s / scale in two parts, each rounded to k's dtype, where a query has ones: half precision's mask would round it once.
    """
    told_B1N1 = key_bias(scale_BN, prefix, suffix, None, scale_BN).transpose(-2, -1) / scale
    told_B1N1 = told_B1N1.clamp(min=torch.finfo(k.dtype).min)  # of scale 0: infinite minus infinite is no number
    high = told_B1N1.to(k.dtype)
    low = (told_B1N1 - high).to(k.dtype)
    shape = (*k.shape[:-1], 1)
    rest = k.new_zeros(1, 1, 1, CHANNELS - 2).expand(*k.shape[:-1], -1)
    asking = torch.cat([q.new_ones(2), q.new_zeros(CHANNELS - 2)]).expand(*q.shape[:-1], -1)
    return torch.cat([q, asking], dim=-1), torch.cat([k, high.expand(shape), low.expand(shape), rest], dim=-1)
