"""Forms of attention on a GPU: which of them a call can take, and the nodes of each.

    mask      stock attention; token scales, if any, are its additive mask
    channel   stock attention; token scales are in additional channels of its heads, which its product sums up
    kernel    attend, for what stock attention can't take

Where tokens are scored, stock attention also returns its log-sum-exp; `attention_scores` computes the scores from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.ops import aten, gtp_fx  # type: ignore[import-not-found]

from gtp_fx.graph.symbols import shape_of
from gtp_fx.ops.stock_attention import CHANNELS
from gtp_fx.passes.lower.lowering import Lowering
from gtp_fx.targets.target import SCALE_FORMS

_HEADS, _TOKENS, _FEATURES = 1, 2, 3
_MOST_SINGLE = 256
"""Most keys that `attend` takes in float32.

It computes float32 products without tensor cores. With more keys these are larger, and torch's own may use TF32.
"""


@dataclass(frozen=True)
class Call:
    """One attention, by either operator.

    node: the call; its first operands are q, k and v.
    bias: its mask, or a `key_bias` call that holds token scales.
    scale: the number that multiplies the logits; None for the default.
    score: the kind of score; None where the operator computes none.
    around: numbers of prefix and suffix tokens.
    """

    node: fx.Node
    bias: Any
    scale: Any
    score: Any = None
    around: tuple[Any, Any] = (0, 0)

    @property
    def operands(self) -> tuple[Any, ...]:
        """q, k and v."""
        return self.node.args[:3]

    @property
    def scales(self) -> tuple[Any, ...] | None:
        """Token scales [B, n], prefix, suffix, and the mask beside them; None where attention gets no scales."""
        has_scales = isinstance(self.bias, fx.Node) and self.bias.target is gtp_fx.key_bias.default
        return self.bias.args[:4] if has_scales else None

    @property
    def mask(self) -> Any:
        """The mask that is added to the logits beside token scales."""
        return self.bias if self.scales is None else self.scales[3]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Numbers of keys, of features of queries and keys, and of features of values."""
        _, k, v = map(shape_of, self.operands)
        return k[_TOKENS], k[_FEATURES], v[_FEATURES]

    @property
    def dtype(self) -> torch.dtype:
        """The operands' dtype."""
        dtype: torch.dtype = self.operands[0].meta["val"].dtype
        return dtype


def form_of(low: Lowering, call: Call) -> str | None:
    """Return the target's form where `call` can take it, else the first possible of `SCALE_FORMS`, else None."""
    shapes = [shape_of(x) for x in call.operands]
    if any(len(shape) != 4 for shape in shapes) or len({shape[_HEADS] for shape in shapes}) > 1:
        return None
    forms = SCALE_FORMS if low.scale_form == "auto" or call.scales is None else (low.scale_form, *SCALE_FORMS)
    if forms[0] == low.scale_form == "mask" and call.score is None:
        return "mask"  # torch's attention always takes a mask, at whatever speed
    return next((form for form in forms if _takes(low, call, form)), None)


def emit_form(low: Lowering, call: Call, form: str) -> tuple[fx.Node, fx.Node | None]:
    """Insert `call` in a form that it can take; return its output, and its scores or None."""
    node, (q, k, v) = call.node, call.operands
    scales, *around = (None, *call.around) if call.scales is None else call.scales[:3]
    if form == "kernel":
        options = (call.mask, scales, call.scale, call.score or "none", *around, [])
        made = low.call(node, low.kernels.attend, q, k, v, *options)
        return low.item(made, 0), low.item(made, 1)
    # Stock attention. Additional channels of queries and keys hold the scales, and values may be padded to the same
    # width, which some kernels need.
    _, head, values = call.sizes
    kernel, taken = _stock(low, call, form)  # type: ignore[misc]
    bias, scale = call.bias, head**-0.5 if call.scale is None else call.scale
    if form == "channel":
        wider = low.call(node, gtp_fx.scale_channels.default, q, k, scales, *around, scale)
        q, k, bias = low.item(wider, 0), low.item(wider, 1), None
    if taken > values:
        v = low.call(node, aten.constant_pad_nd.default, v, [0, taken - values])
    scores = None
    if call.score is None:
        output = low.call(node, aten.scaled_dot_product_attention.default, q, k, v, bias)
        output.kwargs = {"scale": scale}
    else:
        made = low.call(node, gtp_fx.attention_with_lse.default, q, k, v, bias, scale, kernel)
        output, lse = low.item(made, 0), low.item(made, 1)
        ranked = (*call.operands[:2], lse, scale, call.score, *call.around, scales)
        scores = low.call(node, low.kernels.attention_scores, *ranked)
    if taken > values:
        output = low.call(node, aten.slice.Tensor, output, _FEATURES, 0, values)
    return output, scores


def _takes(low: Lowering, call: Call, form: str) -> bool:
    """Tell whether `call` can take a form."""
    if form != "kernel":
        return _stock(low, call, form) is not None
    keys, *sizes = call.sizes
    least, most = low.kernels.heads
    # attend has no tensor cores for float32, so it keeps up with torch's kernels for few keys only.
    many = call.dtype == torch.float32 and keys > _MOST_SINGLE
    return least <= min(sizes) and max(sizes) <= most and not many and (call.scale is None or call.scale > 0)


def _stock(low: Lowering, call: Call, form: str) -> tuple[str, int] | None:
    """Return torch's kernel for `call` in one of the two stock forms, and the features of values that it needs.

    None where torch has no fast kernel for it.
    """
    q, k, _ = map(shape_of, call.operands)
    keys, head, values = call.sizes
    least, most = low.kernels.heads
    # attention_scores is made for self-attention with heads of these sizes.
    scored = call.score is None or (call.score != "none" and q == k and least <= head <= most)
    if low.stock is None or call.mask is not None or not scored:
        return None
    if form == "channel" and call.scales is None:
        return None
    wider = head + CHANNELS if form == "channel" else head
    for taken in (values, wider):
        kernel = low.stock.choice(wider, taken, keys, call.dtype, masked=form == "mask" and call.scales is not None)
        if kernel is not None and taken >= values:
            return kernel, taken
    return None
