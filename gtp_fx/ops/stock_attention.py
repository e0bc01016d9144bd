"""Additions to torch's own attention for lowered graphs: its log-sum-exp, and token scales without a mask.

`torch.nn.functional.scaled_dot_product_attention` returns one tensor. The ATen operators that it calls also return each
row's log-sum-exp, from which a kernel computes scores without a map in memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.ops.attention import key_bias
from gtp_fx.ops.register import operator

CHANNELS = 8
"""Features added to a head for token scales: fused attention needs a multiple of 8."""


def _lse_shapes(*arguments):  # type: ignore[no-untyped-def]
    # Each kernel has a memory layout of its own for its output, which its fake implementation knows.
    return attention_with_lse(*arguments)


@operator(_lse_shapes)
def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None, kernel: str
) -> tuple[Tensor, Tensor]:
    """Attention by one of torch's kernels, with the natural logarithm of each row's sum of exponentials.

    q: [B, H, M, D].
    k: [B, H, N, D].
    v: [B, H, N, E].
    bias: additive, in q's dtype, broadcasts to [B, H, M, N]; flash attention on a GPU takes none.
    scale: factor of the logits; None for D**-0.5.
    kernel: "cudnn", "flash" or "cpu", as `gtp_fx.kernels.stock_attention` chooses.

    Returns the output [B, H, M, E], and [B, H, M] float32, which has no gradient.
    """
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        # These kernels have no gradient for a mask, which a strategy's own token scales may need. Torch then chooses
        # another kernel, and the log-sum-exp is computed here.
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
    """Append `CHANNELS` features to q and k whose product is log s_j on the logits of key j.

    So attention reads token scales without a mask. A key gets log s / scale as two numbers, each rounded to k's dtype,
    where a query has ones. That is more exact than a mask in half precision, which is rounded once.

    q: [B, H, M, D].
    k: [B, H, N, D].
    scale_BN: [B, n] token scales of the patches among the N = prefix + n + suffix keys.
    prefix, suffix: tokens before and after the patches.
    scale: factor that attention multiplies logits by.

    Returns [B, H, M, D + CHANNELS] and [B, H, N, D + CHANNELS].
    """
    bias_B1N1 = key_bias(scale_BN, prefix, suffix, None, scale_BN).transpose(-2, -1) / scale
    bias_B1N1 = bias_B1N1.clamp(min=torch.finfo(k.dtype).min)  # for a token scale of 0: inf - inf below would be nan
    high = bias_B1N1.to(k.dtype)
    low = (bias_B1N1 - high).to(k.dtype)
    shape = (*k.shape[:-1], 1)
    rest = k.new_zeros(1, 1, 1, CHANNELS - 2).expand(*k.shape[:-1], -1)
    ones = torch.cat([q.new_ones(2), q.new_zeros(CHANNELS - 2)]).expand(*q.shape[:-1], -1)
    return torch.cat([q, ones], dim=-1), torch.cat([k, high.expand(shape), low.expand(shape), rest], dim=-1)
