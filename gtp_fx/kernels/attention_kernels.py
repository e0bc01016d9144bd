"""Attention in tiles that also says who receives it and what a token pays itself (arXiv 2311.03035, token selection).

Letters: M queries and N keys of a tile, D features of a head. Each program owns what it stores, so nothing is added by atomics and
results are the same every time. Softmax is in powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gtp_fx.kernels.tile_ops import load_tile, logits_tile, product


@triton.jit
def attend_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, bias_ptr, scales_ptr, threshold_ptr, out_ptr, lse_ptr, received_ptr, own_ptr,
    q_image, q_head, q_row, q_column, k_image, k_head, k_row, k_column, v_image, v_head, v_row, v_column,
    bias_image, bias_head, bias_row, bias_column, out_image, out_head, out_row,
    heads, queries, keys, features, value_features, softmax_scale, counted, prefix, patches,
    HAS_BIAS: tl.constexpr, BOOLEAN: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_THRESHOLD: tl.constexpr,
    ROW_FITS: tl.constexpr, SCORED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """`ROWS` queries of a head: their output, and what scores are made from.

    Where a row fits the tile: received [B, H, parts, N], column sums over this program's queries among the first `counted`, and
    own [B, H, N], the diagonal. Else lse [B, H, N], from which `receive_kernel` makes both.
    """
    parts = tl.cdiv(queries, ROWS)
    part = tl.program_id(0) % parts
    image_head = (tl.program_id(0) // parts).to(tl.int64)
    image, head = image_head // heads, image_head % heads
    q_ptr += image * q_image + head * q_head
    k_ptr += image * k_image + head * k_head
    v_ptr += image * v_image + head * v_head
    bias_ptr += image * bias_image + head * bias_head
    scales_ptr += image * patches
    rows = part * ROWS + tl.arange(0, ROWS)
    of_head, of_value = tl.arange(0, FEATURES), tl.arange(0, VALUES)
    columns = tl.arange(0, COLUMNS)
    q_MD = load_tile(q_ptr, rows, of_head, q_row, q_column, queries, features)
    threshold = tl.load(threshold_ptr + head).to(tl.float32) if HAS_THRESHOLD else 0.0
    if ROW_FITS:
        k_DN = load_tile(k_ptr, of_head, columns, k_column, k_row, features, keys)
        logits_MN = logits_tile(
            q_MD, k_DN, rows, columns, queries, keys, softmax_scale, bias_ptr, bias_row, bias_column,
            scales_ptr, prefix, patches, HAS_BIAS, BOOLEAN, HAS_SCALES,
        )  # fmt: skip
        top_M = tl.max(logits_MN, 1)
        top_M = tl.where(top_M == float("-inf"), 0.0, top_M)
        exp_MN = tl.exp2(logits_MN - top_M[:, None])
        total_M = tl.sum(exp_MN, 1)
        inverse_M = 1.0 / tl.where(total_M == 0.0, 1.0, total_M)
        if HAS_THRESHOLD:
            exp_MN = tl.where(exp_MN * inverse_M[:, None] >= threshold, exp_MN, 0.0)
        v_ND = load_tile(v_ptr, columns, of_value, v_row, v_column, keys, value_features)
        out_MD = product(exp_MN.to(v_ND.dtype), v_ND) * inverse_M[:, None]
        if SCORED:
            map_MN = exp_MN * inverse_M[:, None]
            own_M = tl.sum(tl.where(rows[:, None] == columns[None, :], map_MN, 0.0), 1)
            tl.store(own_ptr + image_head * queries + rows, own_M, mask=rows < queries)
            received_N = tl.sum(tl.where((rows < counted)[:, None], map_MN, 0.0), 0)
            tl.store(received_ptr + (image_head * parts + part) * keys + columns, received_N, mask=columns < keys)
    else:
        top_M = tl.full((ROWS,), float("-inf"), tl.float32)
        total_M = tl.zeros((ROWS,), tl.float32)
        out_MD = tl.zeros((ROWS, VALUES), tl.float32)
        for start in range(0, keys, COLUMNS):
            here = start + columns
            k_DN = load_tile(k_ptr, of_head, here, k_column, k_row, features, keys)
            logits_MN = logits_tile(
                q_MD, k_DN, rows, here, queries, keys, softmax_scale, bias_ptr, bias_row, bias_column,
                scales_ptr, prefix, patches, HAS_BIAS, BOOLEAN, HAS_SCALES,
            )  # fmt: skip
            higher_M = tl.maximum(top_M, tl.max(logits_MN, 1))
            base_M = tl.where(higher_M == float("-inf"), 0.0, higher_M)
            exp_MN = tl.exp2(logits_MN - base_M[:, None])
            shrink_M = tl.exp2(top_M - base_M)
            total_M = total_M * shrink_M + tl.sum(exp_MN, 1)
            if not HAS_THRESHOLD:
                v_ND = load_tile(v_ptr, here, of_value, v_row, v_column, keys, value_features)
                out_MD = out_MD * shrink_M[:, None] + product(exp_MN.to(v_ND.dtype), v_ND)
            top_M = higher_M
        lse_M = tl.where(total_M == 0.0, 0.0, top_M + tl.log2(tl.where(total_M == 0.0, 1.0, total_M)))
        if HAS_THRESHOLD:  # an entry is known when its row is: a second look
            for start in range(0, keys, COLUMNS):
                here = start + columns
                k_DN = load_tile(k_ptr, of_head, here, k_column, k_row, features, keys)
                logits_MN = logits_tile(
                    q_MD, k_DN, rows, here, queries, keys, softmax_scale, bias_ptr, bias_row, bias_column,
                    scales_ptr, prefix, patches, HAS_BIAS, BOOLEAN, HAS_SCALES,
                )  # fmt: skip
                map_MN = tl.exp2(logits_MN - lse_M[:, None])
                map_MN = tl.where(map_MN >= threshold, map_MN, 0.0)
                v_ND = load_tile(v_ptr, here, of_value, v_row, v_column, keys, value_features)
                out_MD += product(map_MN.to(v_ND.dtype), v_ND)
        else:
            out_MD = out_MD / tl.where(total_M == 0.0, 1.0, total_M)[:, None]
        if SCORED:
            tl.store(lse_ptr + image_head * queries + rows, lse_M, mask=rows < queries)
    out_ptr += image * out_image + head * out_head
    inside = (rows < queries)[:, None] & (of_value < value_features)[None, :]
    tl.store(out_ptr + rows[:, None] * out_row + of_value[None, :], out_MD.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def receive_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, bias_ptr, scales_ptr, threshold_ptr, lse_ptr, received_ptr, own_ptr,
    q_image, q_head, q_row, q_column, k_image, k_head, k_row, k_column,
    bias_image, bias_head, bias_row, bias_column,
    heads, queries, keys, features, softmax_scale, counted, prefix, patches,
    HAS_BIAS: tl.constexpr, BOOLEAN: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_THRESHOLD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """`COLUMNS` keys of a head: received [B, H, 1, N], their column sums over the first `counted` queries, and own [B, H, N]."""
    blocks = tl.cdiv(keys, COLUMNS)
    image_head = (tl.program_id(0) // blocks).to(tl.int64)
    image, head = image_head // heads, image_head % heads
    q_ptr += image * q_image + head * q_head
    k_ptr += image * k_image + head * k_head
    bias_ptr += image * bias_image + head * bias_head
    scales_ptr += image * patches
    columns = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    of_head = tl.arange(0, FEATURES)
    threshold = tl.load(threshold_ptr + head).to(tl.float32) if HAS_THRESHOLD else 0.0
    k_DN = load_tile(k_ptr, of_head, columns, k_column, k_row, features, keys)
    received_N = tl.zeros((COLUMNS,), tl.float32)
    own_N = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, counted, ROWS):
        rows = start + tl.arange(0, ROWS)
        q_MD = load_tile(q_ptr, rows, of_head, q_row, q_column, queries, features)
        logits_MN = logits_tile(
            q_MD, k_DN, rows, columns, queries, keys, softmax_scale, bias_ptr, bias_row, bias_column,
            scales_ptr, prefix, patches, HAS_BIAS, BOOLEAN, HAS_SCALES,
        )  # fmt: skip
        lse_M = tl.load(lse_ptr + image_head * queries + rows, mask=rows < counted, other=float("inf"))
        map_MN = tl.exp2(logits_MN - lse_M[:, None])  # 0 behind the last query
        if HAS_THRESHOLD:
            map_MN = tl.where(map_MN >= threshold, map_MN, 0.0)
        received_N += tl.sum(map_MN, 0)
        own_N += tl.sum(tl.where(rows[:, None] == columns[None, :], map_MN, 0.0), 0)
    inside = columns < keys
    tl.store(received_ptr + image_head * keys + columns, received_N, mask=inside)
    tl.store(own_ptr + image_head * keys + columns, own_N, mask=inside)
