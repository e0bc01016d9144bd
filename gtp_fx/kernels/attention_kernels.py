"""Attention in tiles, with token scales and biases (arXiv 2311.03035, proportional attention).

Letters: M queries and N keys of a tile, D features of a head. Each program owns what it stores: there are no atomics,
and results are reproducible. Softmax is in powers of two; token scales enter it as logarithms.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gtp_fx.kernels.tile_ops import LOG2_E, keys_tile, load_tile, logits_tile, product


@triton.jit
def attend_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, bias_ptr, log_scales_ptr, out_ptr, lse_ptr, top_ptr, received_ptr, own_ptr,
    q_image, q_head, q_row, q_column, k_image, k_head, k_row, k_column, v_image, v_head, v_row, v_column,
    bias_image, bias_head, bias_row, bias_column, out_image, out_head, out_row,
    heads, queries, keys, features, value_features, softmax_scale, counted,
    HAS_BIAS: tl.constexpr, BOOLEAN: tl.constexpr, HAS_SCALES: tl.constexpr,
    ROW_FITS: tl.constexpr, SCORED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Compute the output of `ROWS` queries of a head, and what their scores are made from.

    Where a row of keys fits the tile (ROW_FITS), scores are made from two results:
    received: [B, H, parts, N], sums of the map's columns over this program's queries among the first `counted`.
    own: [B, H, N], the map's diagonal.

    Else `scores_kernel` makes both of these from:
    lse: [B, H, N], natural logarithm of each row's sum of exponentials; with a bias, of the logits minus `top`.
    top: [B, H, N], with a bias each row's largest logit. It is separate since the sum's logarithm might be lost
        in rounding beside a logit of large magnitude.
    """
    parts = tl.cdiv(queries, ROWS)
    part = tl.program_id(0) % parts
    image_head = (tl.program_id(0) // parts).to(tl.int64)
    image, head = image_head // heads, image_head % heads
    q_ptr += image * q_image + head * q_head
    k_ptr += image * k_image + head * k_head
    v_ptr += image * v_image + head * v_head
    bias_ptr += image * bias_image + head * bias_head
    log_scales_ptr += image * tl.cdiv(keys, COLUMNS) * COLUMNS
    rows = part * ROWS + tl.arange(0, ROWS)
    of_head, of_value = tl.arange(0, FEATURES), tl.arange(0, VALUES)
    q_MD = load_tile(q_ptr, rows, of_head, q_row, q_column, queries, features)
    exponent = softmax_scale if HAS_BIAS else softmax_scale * LOG2_E
    # Factor of a logit's distance from the largest one that is not yet in the logits themselves.
    unit = LOG2_E if HAS_BIAS else (1.0 if HAS_SCALES else exponent)
    if ROW_FITS:  # the whole row at once: the map's entries are final, and so are their sums
        columns = tl.arange(0, COLUMNS)
        k_ND = keys_tile(k_ptr, columns, of_head, k_row, k_column, keys, features, True)
        logits_MN = logits_tile(
            q_MD, k_ND, rows, columns, queries, keys, exponent, bias_ptr, bias_row, bias_column, log_scales_ptr,
            HAS_BIAS, BOOLEAN, HAS_SCALES, True,
        )  # fmt: skip
        exp_MN = _powers(logits_MN, _finite(tl.max(logits_MN, 1)), unit, HAS_BIAS)
        total_M = tl.sum(exp_MN, 1)
        inverse_M = 1.0 / tl.where(total_M == 0.0, 1.0, total_M)
        v_ND = keys_tile(v_ptr, columns, of_value, v_row, v_column, keys, value_features, True)
        out_MD = product(exp_MN.to(v_ND.dtype), v_ND) * inverse_M[:, None]
        if SCORED:
            map_MN = exp_MN * inverse_M[:, None]
            own_M = tl.sum(tl.where(rows[:, None] == columns[None, :], map_MN, 0.0), 1)
            tl.store(own_ptr + image_head * queries + rows, own_M, mask=rows < queries)
            received_N = tl.sum(tl.where((rows < counted)[:, None], map_MN, 0.0), 0)
            tl.store(received_ptr + (image_head * parts + part) * keys + columns, received_N, mask=columns < keys)
    else:
        # Flash attention: the softmax is corrected tile by tile. The last tile, which may have fewer keys, follows the
        # loop, which then needs no mask. Large heads and float32 have no registers for such a second copy of the step.
        peeled: tl.constexpr = FEATURES <= 64 and VALUES <= 64 and q_ptr.dtype.element_ty != tl.float32
        last = (tl.cdiv(keys, COLUMNS) - 1) * COLUMNS if peeled else keys
        top_M = tl.full((ROWS,), float("-inf"), tl.float32)
        total_M = tl.zeros((ROWS,), tl.float32)
        out_MD = tl.zeros((ROWS, VALUES), tl.float32)
        for start in range(0, last, COLUMNS):
            top_M, total_M, out_MD = _softmax_step(
                top_M, total_M, out_MD, q_MD, start, rows, of_head, of_value, exponent, unit,
                k_ptr, k_row, k_column, v_ptr, v_row, v_column, bias_ptr, bias_row, bias_column, log_scales_ptr,
                queries, keys, features, value_features, HAS_BIAS, BOOLEAN, HAS_SCALES, not peeled, COLUMNS,
            )  # fmt: skip
        if peeled:
            top_M, total_M, out_MD = _softmax_step(
                top_M, total_M, out_MD, q_MD, last, rows, of_head, of_value, exponent, unit,
                k_ptr, k_row, k_column, v_ptr, v_row, v_column, bias_ptr, bias_row, bias_column, log_scales_ptr,
                queries, keys, features, value_features, HAS_BIAS, BOOLEAN, HAS_SCALES, True, COLUMNS,
            )  # fmt: skip
        safe_M = tl.where(total_M == 0.0, 1.0, total_M)  # 0: the row sees no key
        out_MD = out_MD / safe_M[:, None]
        if SCORED:
            at = image_head * queries + rows
            lse_M = tl.log2(safe_M)
            if HAS_BIAS:
                tl.store(top_ptr + at, _finite(top_M), mask=rows < queries)
            else:
                lse_M += _finite(top_M) * unit
            tl.store(lse_ptr + at, lse_M / LOG2_E, mask=rows < queries)
    out_ptr += image * out_image + head * out_head
    inside = (rows < queries)[:, None] & (of_value < value_features)[None, :]
    tl.store(out_ptr + rows[:, None] * out_row + of_value[None, :], out_MD.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _softmax_step(  # type: ignore[no-untyped-def]
    top_M, total_M, out_MD, q_MD, start, rows, of_head, of_value, exponent, unit,
    k_ptr, k_row, k_column, v_ptr, v_row, v_column, bias_ptr, bias_row, bias_column, log_scales_ptr,
    queries, keys, features, value_features,
    HAS_BIAS: tl.constexpr, BOOLEAN: tl.constexpr, HAS_SCALES: tl.constexpr,
    LAST: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add `COLUMNS` keys to each row's largest logit, sum of exponentials and weighted sum of values; return the three.

    LAST: some of the keys may be after the last one.
    """
    columns = start + tl.arange(0, COLUMNS)
    k_ND = keys_tile(k_ptr, columns, of_head, k_row, k_column, keys, features, LAST)
    logits_MN = logits_tile(
        q_MD, k_ND, rows, columns, queries, keys, exponent, bias_ptr, bias_row, bias_column, log_scales_ptr,
        HAS_BIAS, BOOLEAN, HAS_SCALES, LAST,
    )  # fmt: skip
    higher_M = tl.maximum(top_M, tl.max(logits_MN, 1))
    base_M = _finite(higher_M)
    exp_MN = _powers(logits_MN, base_M, unit, HAS_BIAS)
    # Exactly 1 where the largest logit stays the same: a rounding would accumulate over tiles.
    shrink_M = tl.exp2((top_M - base_M) * unit)
    total_M = total_M * shrink_M + tl.sum(exp_MN, 1)
    v_ND = keys_tile(v_ptr, columns, of_value, v_row, v_column, keys, value_features, LAST)
    out_MD = out_MD * shrink_M[:, None] + product(exp_MN.to(v_ND.dtype), v_ND)
    return higher_M, total_M, out_MD


@triton.jit
def _powers(logits_MN, base_M, unit, HAS_BIAS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return 2 to the power of (logits - base) * unit, [M, N].

    With a bias logits and base may be so large that multiplied by `unit` they overflow, so they are subtracted first.
    """
    return tl.exp2((logits_MN - base_M[:, None]) * unit if HAS_BIAS else logits_MN * unit - (base_M * unit)[:, None])


@triton.jit
def _finite(top_M):  # type: ignore[no-untyped-def]
    """Return each row's largest logit, 0 where the row sees no key: infinity minus infinity would be NaN."""
    return tl.where(top_M == float("-inf"), 0.0, top_M)
