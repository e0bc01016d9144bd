"""Attention that scores its tokens, or is told their scales, as kernels."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.ops import gtp_fx  # type: ignore[import-not-found]

from gtp_fx.passes.lower.lowering import Lowering
from gtp_fx.sizes import shape_of


def lower_attention(low: Lowering, node: fx.Node) -> None:
    """Stock attention keeps its kernel, but where token scales are its mask: fused attention takes none that is any good."""
    options = dict(zip(("attn_mask", "dropout_p", "is_causal"), node.args[3:], strict=False)) | dict(node.kwargs)
    if any(options.get(option) for option in ("dropout_p", "is_causal", "enable_gqa")):
        return
    if _scales_of(options.get("attn_mask")) is not None:
        made = _attend(low, node, options["attn_mask"], options.get("scale"), "none", 0, 0)
        if made is not None:
            low.swap(node, low.item(made, 0))


def lower_scored_attention(low: Lowering, node: fx.Node) -> None:
    _, _, _, bias, scale, sparsity, score, prefix, suffix, *rest = node.args
    thresholds = rest[0] if rest else None
    if sparsity == 1.0 or thresholds is not None:
        made = _attend(low, node, bias, scale, score, prefix, suffix, thresholds=thresholds)
        if made is not None:
            low.swap(node, made)


def _attend(
    low: Lowering, node: fx.Node, bias: Any, scale: Any, score: Any, *around: Any, thresholds: Any = None
) -> fx.Node | None:
    """In place of `node`, whose first operands are q, k and v; None where the kernel isn't made for them."""
    q, k, v, *_ = node.args
    scales = _scales_of(bias)
    if scales is not None:
        scales, *around, bias, _ = bias.args  # type: ignore[assignment]
    sizes = [shape_of(x) for x in (q, k, v)]  # type: ignore[arg-type]
    least, most = low.kernels.heads
    if any(len(size) != 4 or not least <= size[-1] <= most or size[1] != sizes[0][1] for size in sizes):
        return None
    return low.call(node, low.kernels.attend, q, k, v, bias, scales, thresholds, scale, score, *around, [])


def _scales_of(bias: Any) -> fx.Node | None:
    is_told = isinstance(bias, fx.Node) and bias.target is gtp_fx.key_bias.default
    return bias.args[0] if is_told else None
