"""Scores from each row's log-sum-exp (arXiv 2311.03035, token selection).

With a row's log-sum-exp any entry of the attention map takes one dot product. A program owns some keys of a head and
reads all queries. Sums over queries stay with the thread that made their entries until the end, so the loop has no
reduction. The diagonal is one dot product a row, outside the loop. Nothing of size N x N is in memory; there are no
atomics, and results are reproducible.

Letters: N keys and M queries of a tile, D features of a head.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gtp_fx.kernels.backward import differentiable
from gtp_fx.kernels.launch import launcher
from gtp_fx.kernels.tile_ops import LOG2_E, biased, load_tile, product
from gtp_fx.kernels.tiles import power_of_two, score_tile
from gtp_fx.ops.attention import over_heads
from gtp_fx.ops.register import shaped


@triton.jit
def scores_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, bias_ptr, lse_ptr, top_ptr, scales_ptr, received_ptr, own_ptr,
    q_image, q_head, q_row, q_column, k_image, k_head, k_row, k_column,
    bias_image, bias_head, bias_row, bias_column, lse_image, lse_head, lse_row,
    heads, queries, features, softmax_scale, counted, prefix, patches,
    HAS_BIAS: tl.constexpr, BOOLEAN: tl.constexpr, HAS_SCALES: tl.constexpr,
    RECEIVED: tl.constexpr, OWN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Compute what the scores of `ROWS` patches of a head, as keys, are made from.

    received: [B, H, n], sums of the map's columns over the first `counted` queries, with RECEIVED.
    own: [B, H, n], the map's diagonal, with OWN.
    lse: log-sum-exp of each row's logits, [B, H, N]; with a bias, of the logits minus `top`.
    top: each row's largest logit, [B, H, N]; read with a bias only.
    """
    blocks = tl.cdiv(patches, ROWS)
    image_head = (tl.program_id(0) // blocks).to(tl.int64)
    image, head = image_head // heads, image_head % heads
    q_ptr += image * q_image + head * q_head
    k_ptr += image * k_image + head * k_head
    bias_ptr += image * bias_image + head * bias_head
    lse_ptr += image * lse_image + head * lse_head
    top_ptr += image * lse_image + head * lse_head
    patch = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    inside, rows = patch < patches, prefix + patch
    of_head = tl.arange(0, FEATURES)
    k_ND = load_tile(k_ptr, rows, of_head, k_row, k_column, prefix + patches, features)
    exponent = softmax_scale if HAS_BIAS else softmax_scale * LOG2_E
    # Logits are in units of log 2, but with a bias in natural units until `top` is subtracted, so log s is as well.
    log_s_N = tl.zeros((ROWS,), tl.float32)
    if HAS_SCALES:
        log_s_N = tl.log2(tl.load(scales_ptr + image * patches + patch, mask=inside, other=1.0).to(tl.float32))
        if HAS_BIAS:
            log_s_N /= LOG2_E
    place = image_head * patches + patch
    if RECEIVED:
        sums_NM = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, counted, COLUMNS):
            asking = start + tl.arange(0, COLUMNS)
            q_DM = load_tile(q_ptr, of_head, asking, q_column, q_row, features, queries)
            lse_M = tl.load(
                lse_ptr + asking * lse_row, mask=asking < counted, other=float("inf")
            )  # entries 0 after the last
            logits_NM = product(k_ND, q_DM) * exponent
            if HAS_BIAS:
                seen = inside[:, None] & (asking < queries)[None, :]
                bias_NM = tl.load(
                    bias_ptr + rows[:, None] * bias_column + asking[None, :] * bias_row, mask=seen, other=0
                )
                logits_NM = biased(logits_NM, bias_NM, BOOLEAN)
            if HAS_SCALES:
                logits_NM += log_s_N[:, None]
            if HAS_BIAS:
                top_M = tl.load(top_ptr + asking * lse_row, mask=asking < counted, other=0.0)
                logits_NM = (logits_NM - top_M[None, :]) * LOG2_E
            sums_NM += tl.exp2(logits_NM - (lse_M * LOG2_E)[None, :])
        tl.store(received_ptr + place, tl.sum(sums_NM, 1), mask=inside)
    if OWN:
        q_ND = load_tile(q_ptr, rows, of_head, q_row, q_column, prefix + patches, features)
        logit_N = tl.sum(q_ND.to(tl.float32) * k_ND.to(tl.float32), 1) * exponent
        if HAS_BIAS:
            logit_N = biased(
                logit_N, tl.load(bias_ptr + rows * (bias_row + bias_column), mask=inside, other=0), BOOLEAN
            )
        logit_N += log_s_N
        if HAS_BIAS:
            logit_N = (logit_N - tl.load(top_ptr + rows * lse_row, mask=inside, other=0.0)) * LOG2_E
        lse_N = tl.load(lse_ptr + rows * lse_row, mask=inside, other=0.0)
        tl.store(own_ptr + place, tl.exp2(logit_N - lse_N * LOG2_E), mask=inside)


def score_patches(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    top: Tensor,
    scales: Tensor | None,
    scale: float | None,
    score: str,
    prefix: int,
    suffix: int,
) -> Tensor:
    """Launch the kernel, inside a triton_op, and return the scores [B, n].

    q, k: [B, H, N, D], any strides.
    bias: boolean or additive, [B, H, N, N], any strides, or None.
    lse: log-sum-exp of the logits, [B, H, N], any strides; with a bias, of the logits minus `top`.
    top: each row's largest logit, in lse's strides; not read without a bias.
    scales: token scales [B, n], or None.
    scale: factor of the logits; None for D**-0.5.
    """
    batch, heads, tokens, features = q.shape
    assert k.shape == q.shape, "the diagonal is that of self-attention"
    kind, _, how = score.partition("-")
    patches = tokens - prefix - suffix
    cut = score_tile(features, q.dtype)
    receives, owns = kind != "regenerate", kind in ("regenerate", "mixed")
    nothing = q.new_empty(1, dtype=torch.float32)  # stands for operands that are neither read nor written
    received, own = (
        q.new_empty(batch, heads, patches, dtype=torch.float32) if wanted else nothing for wanted in (receives, owns)
    )
    launcher(scores_kernel)[(triton.cdiv(patches, cut.rows) * batch * heads,)](
        q, k, nothing if bias is None else bias, lse, top, nothing if scales is None else scales.contiguous(),
        received, own,
        *q.stride(), *k.stride(), *((0, 0, 0, 0) if bias is None else bias.stride()), *lse.stride(),
        heads, tokens, features, features**-0.5 if scale is None else scale, 1 if kind == "cls" else tokens,
        prefix, patches,
        HAS_BIAS=bias is not None, BOOLEAN=bias is not None and bias.dtype == torch.bool,
        HAS_SCALES=scales is not None, RECEIVED=receives, OWN=owns,
        ROWS=cut.rows, COLUMNS=cut.columns, FEATURES=power_of_two(features),
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    factors = [over_heads(part, how) for part, wanted in ((own, owns), (received, receives)) if wanted]
    return math.prod(factors[1:], start=factors[0])


def _shapes(q, k, lse, scale, score, prefix, suffix, scales):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape[0], k.shape[2] - prefix - suffix, dtype=torch.float32)


@shaped("attention_scores", _shapes)
@torch.library.triton_op("gtp_fx_kernels::attention_scores", mutates_args={})
def attention_scores(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float | None,
    score: str,
    prefix: int,
    suffix: int,
    scales: Tensor | None,
) -> Tensor:
    """Return the scores of `torch.ops.gtp_fx.attention_with_scores`, [B, n] float32, of the patches. No gradient.

    q, k: [B, H, N, D] of float32, bfloat16 or float16, any strides, D from 16 to 128.
    lse: [B, H, N] float32, any strides, the natural logarithm of the sum of exponentials of each query's logits, with
        log s added where attention had token scales.
    scale: factor of the logits; None for D**-0.5.
    score: a name in `gtp_fx.ops.attention.SCORES`.
    prefix, suffix: how many of the N tokens come before and after the n patches.
    scales: token scales [B, n] where attention had them, or None.

    Tolerance: products of half-precision numbers are exact in float32, in which they are added. An entry exp(x - lse)
    is as far off as x and lse are, some 1e-6 of either's size. Where attention rounded log s to a lower dtype, that is
    in lse but not in `scales`: an entry is off by that rounding, 2^-9 of |log s| in bfloat16.
    """
    return score_patches(q, k, None, lse, lse, scales, scale, score, prefix, suffix)


differentiable(attention_scores, lambda *arguments: ())
