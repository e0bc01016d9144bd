"""What kernels do with a tile: load it, multiply two, make attention's logits, which are made again rather than kept."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Triton's interpreter has no bfloat16 products; there operands are widened, which changes no product."""


@triton.jit
def load_tile(pointer, rows, columns, row_stride, column_stride, row_count, column_count):  # type: ignore[no-untyped-def]
    """[rows, columns] of a matrix, 0 outside it."""
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    return tl.load(pointer + rows[:, None] * row_stride + columns[None, :] * column_stride, mask=inside, other=0.0)


@triton.jit
def product(a_MK, b_KN):  # type: ignore[no-untyped-def]
    """[M, N] float32: no TF32, sums in float32."""
    if INTERPRETED:
        a_MK, b_KN = a_MK.to(tl.float32), b_KN.to(tl.float32)
    return tl.dot(a_MK, b_KN, input_precision="ieee")


@triton.jit
def logits_tile(  # type: ignore[no-untyped-def]
    q_MD, k_DN, rows, columns, queries, keys, softmax_scale, bias_ptr, bias_row_stride, bias_column_stride,
    scales_ptr, prefix, patches, HAS_BIAS: tl.constexpr, BOOLEAN: tl.constexpr, HAS_SCALES: tl.constexpr,
):  # fmt: skip
    """q·kᵀ·scale + bias + log s in units of log 2, [M, N] float32; -inf behind the last key. s: of the keys' patches."""
    logits_MN = product(q_MD, k_DN) * (softmax_scale * LOG2_E)
    if HAS_BIAS:
        inside = (rows < queries)[:, None] & (columns < keys)[None, :]
        places = rows[:, None] * bias_row_stride + columns[None, :] * bias_column_stride
        bias_MN = tl.load(bias_ptr + places, mask=inside, other=0)
        if BOOLEAN:
            logits_MN = tl.where(bias_MN != 0, logits_MN, float("-inf"))
        else:
            logits_MN += bias_MN.to(tl.float32) * LOG2_E
    if HAS_SCALES:
        patch = columns - prefix
        s_N = tl.load(scales_ptr + patch, mask=(patch >= 0) & (patch < patches), other=1.0)
        logits_MN += tl.log2(s_N)[None, :]
    return tl.where((columns < keys)[None, :], logits_MN, float("-inf"))
