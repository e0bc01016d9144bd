"""Operations on tiles that kernels share: load, multiply, and make attention's logits.

Logits are made again where they are needed rather than kept in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether Triton's interpreter runs. It has no bfloat16 products, so operands are widened there, which is exact."""


@triton.jit
def load_tile(pointer, rows, columns, row_stride, column_stride, row_count, column_count):  # type: ignore[no-untyped-def]
    """Load [rows, columns] of a matrix, 0 outside it."""
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    return tl.load(pointer + rows[:, None] * row_stride + columns[None, :] * column_stride, mask=inside, other=0.0)


@triton.jit
def product(a_MK, b_KN):  # type: ignore[no-untyped-def]
    """Multiply [M, K] by [K, N] to [M, N] float32: no TF32, sums in float32."""
    if INTERPRETED:
        a_MK, b_KN = a_MK.to(tl.float32), b_KN.to(tl.float32)
    return tl.dot(a_MK, b_KN, input_precision="ieee")


@triton.jit
def keys_tile(pointer, keys_N, of_head, key_stride, feature_stride, keys, features, LAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load [N, D] of keys or values, 0 outside. LAST: some of `keys_N` may be after the last key."""
    inside = (of_head < features)[None, :]
    if LAST:
        inside &= (keys_N < keys)[:, None]
    return tl.load(pointer + keys_N[:, None] * key_stride + of_head[None, :] * feature_stride, mask=inside, other=0.0)


@triton.jit
def logits_tile(  # type: ignore[no-untyped-def]
    q_MD, k_ND, rows, columns, queries, keys, exponent, bias_ptr, bias_row_stride, bias_column_stride, log_scales_ptr,
    HAS_BIAS: tl.constexpr, BOOLEAN: tl.constexpr, HAS_SCALES: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Return logits [M, N] float32, -inf after the last key.

    With a bias: q·kᵀ·exponent + bias + log s. With scales alone: q·kᵀ·exponent + log2 s, in units of log 2. With
    neither: q·kᵀ, which the caller multiplies by `exponent` later.

    log_scales: log2 s for each key, -inf after the last one.
    LAST: some of `columns` may be after the last key.
    """
    logits_MN = product(q_MD, tl.trans(k_ND))
    if HAS_BIAS or HAS_SCALES:
        logits_MN *= exponent
    if HAS_BIAS:
        inside = (rows < queries)[:, None] & (columns < keys)[None, :]
        places = rows[:, None] * bias_row_stride + columns[None, :] * bias_column_stride
        logits_MN = biased(logits_MN, tl.load(bias_ptr + places, mask=inside, other=0), BOOLEAN)
    if HAS_SCALES:
        log_s_N = tl.load(log_scales_ptr + columns)
        logits_MN += (log_s_N / LOG2_E if HAS_BIAS else log_s_N)[None, :]
    elif LAST:
        logits_MN = tl.where((columns < keys)[None, :], logits_MN, float("-inf"))
    return logits_MN


@triton.jit
def biased(logits, bias, BOOLEAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return logits plus a bias, or with BOOLEAN logits that are -inf where the bias is False.

    Both are in natural units: a bias may be the lowest number there is, which in units of log 2 would be -inf.
    """
    if BOOLEAN:
        logits = tl.where(bias != 0, logits, float("-inf"))
    else:
        logits += bias.to(tl.float32)
    return logits
