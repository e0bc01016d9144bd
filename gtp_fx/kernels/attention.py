"""Attention with scores on a GPU.

Where a row of keys fits a tile, one kernel does both; else a flash-style one is followed by `scores_kernel`. The map is
never in memory. The kernel itself adds token scales and biases, so that attention on a shortened stream needs no mask,
which would slow it.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from gtp_fx.kernels.attention_kernels import attend_kernel
from gtp_fx.kernels.backward import differentiable
from gtp_fx.kernels.launch import launcher
from gtp_fx.kernels.scores import score_patches
from gtp_fx.kernels.tiles import AttentionTile, power_of_two
from gtp_fx.kernels.tuned import best_tile
from gtp_fx.ops.attention import attention_map, key_bias, over_heads
from gtp_fx.ops.register import shaped

HEADS = (16, 128)
"""Smallest and largest head size that the tiles are made for."""


def _shapes(q, k, v, bias, scales, scale, score, prefix, suffix, tile):  # type: ignore[no-untyped-def]
    batch, heads, tokens, _ = q.shape
    ranked = 0 if score == "none" else tokens - prefix - suffix
    out = v.new_empty(batch, tokens, heads, v.shape[-1]).transpose(1, 2)
    return out, q.new_empty(batch, ranked, dtype=torch.float32)


@shaped("attend", _shapes)
@torch.library.triton_op("gtp_fx_kernels::attend", mutates_args={})
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scales: Tensor | None,
    scale: float | None,
    score: str,
    prefix: int,
    suffix: int,
    tile: list[int],
) -> tuple[Tensor, Tensor]:
    """Return the output [B, H, N, E] and scores [B, n] of `torch.ops.gtp_fx.attention_with_scores`, after `key_bias`.

    q, k: [B, H, N, D] of float32, bfloat16 or float16, any strides, D from 16 to 128.
    v: [B, H, N, E] of the same dtype, any strides, E from 16 to 128.
    bias: as SDPA's mask, boolean (True: attend) or additive; None for none.
    scales: token scales [B, n] of the n patches between prefix and suffix; None where all are 1.
    scale: factor of the logits, positive; None for D**-0.5.
    score: a name in `gtp_fx.ops.attention.SCORES`, or "none" for no scores, [B, 0].
    prefix, suffix: how many of the keys come before and after the patches.
    tile: `AttentionTile.arguments`, or [] for the best that is known.

    For score "none" the numbers of keys and queries may differ. The output lies in memory as [B, N, H, E] does.

    Tolerance: like fused attention it rounds exponentials, not the map, to v's dtype before the second product, and
    adds in float32. In float32 products are IEEE, so it differs from the reference by the order of sums (some 1e-6
    relative). In bfloat16 each output is a weighted mean whose weights were rounded to 2^-9 on either side, so it is
    within 2^-8 of the largest |v|, in addition to the output's own rounding. Scores are never in the lower dtype: they
    differ by 1e-5.
    """
    batch, heads, queries, features = q.shape
    keys, values = v.shape[-2:]
    scale = features**-0.5 if scale is None else scale
    assert scale > 0, "the kernel takes the largest product for the largest logit"
    assert queries == keys or score == "none", "scores are those of self-attention"
    # One tile may hold all keys of a row: then the kernel has the map's entries, and finds the scores as well.
    cut = AttentionTile(*tile) if tile else best_tile(keys, max(features, values), q.dtype, q.device)
    fits = cut.columns >= keys
    parts = triton.cdiv(queries, cut.rows)
    scored = score != "none"
    columns = triton.cdiv(keys, cut.columns) * cut.columns
    kind, _, how = score.partition("-")
    bias_BHMN = None if bias is None else bias.expand(batch, heads, queries, keys)
    nothing = q.new_empty(1, dtype=torch.float32)  # stands for operands that are neither read nor written
    out_BNHD = v.new_empty(batch, queries, heads, values)
    rows = q.new_empty(2, batch, heads, queries, dtype=torch.float32) if scored and not fits else None
    lse, top = (nothing, nothing) if rows is None else rows
    received = q.new_empty(batch, heads, parts, keys, dtype=torch.float32) if scored and fits else nothing
    own = q.new_empty(batch, heads, keys, dtype=torch.float32) if scored and fits else nothing
    launcher(attend_kernel)[(parts * batch * heads,)](
        q, k, v, nothing if bias_BHMN is None else bias_BHMN,
        nothing if scales is None else _log_scales(scales, prefix, suffix, columns),
        out_BNHD, lse, top, received, own,
        *q.stride(), *k.stride(), *v.stride(), *((0, 0, 0, 0) if bias_BHMN is None else bias_BHMN.stride()),
        out_BNHD.stride(0), out_BNHD.stride(2), out_BNHD.stride(1),
        heads, queries, keys, features, values, scale, 1 if kind == "cls" else queries,
        HAS_BIAS=bias is not None, BOOLEAN=bias is not None and bias.dtype == torch.bool,
        HAS_SCALES=scales is not None, ROW_FITS=fits, SCORED=scored,
        ROWS=cut.rows, COLUMNS=cut.columns, FEATURES=power_of_two(features), VALUES=power_of_two(values),
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    out = out_BNHD.transpose(1, 2)
    if not scored:
        return out, q.new_empty(batch, 0, dtype=torch.float32)
    if not fits:  # a second kernel makes the map's entries again, from each row's log-sum-exp
        return out, score_patches(q, k, bias_BHMN, lse, top, scales, scale, score, prefix, suffix)
    # Scores are products of the diagonal (regeneration) and of column sums (broadcasting), whose parts are added here.
    stop = keys - suffix
    factors = []
    if kind in ("regenerate", "mixed"):
        factors.append(over_heads(own[..., prefix:stop], how))
    if kind in ("broadcast", "mixed", "cls"):
        factors.append(over_heads(received.sum(dim=2)[..., prefix:stop], how))
    return out, math.prod(factors[1:], start=factors[0])


def _reference(q, k, v, bias, scales, scale, score, prefix, suffix, tile):  # type: ignore[no-untyped-def]
    """Return the output in plain ATen, which backward differentiates. Scores only rank, and have no gradient."""
    if scales is not None:
        bias = key_bias(scales, prefix, suffix, bias, q)
    exp_BHMN, inverse_BHM1 = attention_map(q, k, bias, scale)
    map_BHMN = exp_BHMN * inverse_BHM1
    return (torch.matmul(map_BHMN.to(v.dtype), v),)


differentiable(attend, _reference)


def _log_scales(scales: Tensor, prefix: int, suffix: int, columns: int) -> Tensor:
    """Return log2 s as [B, columns]: 0 for tokens that are no patches, -inf after the last key.

    Padded so, the kernel needs no special cases.
    """
    batch, patches = scales.shape
    ahead, following = (scales.new_zeros(batch, count, dtype=torch.float32) for count in (prefix, suffix))
    beyond = ahead.new_full((batch, columns - prefix - patches - suffix), float("-inf"))
    return torch.cat([ahead, scales.float().log2(), following, beyond], dim=1)
