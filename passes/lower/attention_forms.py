"""The forms that attention takes on a GPU: which of them a call can take, and the nodes of each.

    mask      stock attention, told scales as its additive mask; without one where it is told none
    channel   stock attention, told scales in channels of its heads, which its product adds up
    kernel    attend, for what stock attention can't take

Where attention scores, stock attention also returns its log-sum-exp, and `attention_scores` makes the scores of that.
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
from gtp_fx.targets.target import TOLD

_HEADS, _TOKENS, _FEATURES = 1, 2, 3
_MOST_SINGLE = 256
"""Keys that `attend` takes in float32, whose products it makes without tensor cores: above, torch's may have TF32 and are larger."""


@dataclass(frozen=True)
class Call:
    """One attention, by either operator: its first operands are q, k and v.

    bias: its mask, or what tells it scales. score: None where the operator makes none. around: prefix and suffix tokens.
    """

    node: fx.Node
    bias: Any
    scale: Any
    score: Any = None
    around: tuple[Any, Any] = (0, 0)

    @property
    def operands(self) -> tuple[Any, ...]:
        return self.node.args[:3]

    @property
    def told(self) -> tuple[Any, ...] | None:
        """Scales [B, n], prefix, suffix, and the mask beside them; None where no scales are told."""
        is_told = isinstance(self.bias, fx.Node) and self.bias.target is gtp_fx.key_bias.default
        return self.bias.args[:4] if is_told else None

    @property
    def mask(self) -> Any:
        """What else is added to its logits."""
        return self.bias if self.told is None else self.told[3]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Keys, features of queries and keys, features of values."""
        _, k, v = map(shape_of, self.operands)
        return k[_TOKENS], k[_FEATURES], v[_FEATURES]

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.operands[0].meta["val"].dtype
        return dtype


def form_of(low: Lowering, call: Call) -> str | None:
    """The form that the target asks for where `call` can take it, else the first in `TOLD`'s order; None where it can take none."""
    shapes = [shape_of(x) for x in call.operands]
    if any(len(shape) != 4 for shape in shapes) or len({shape[_HEADS] for shape in shapes}) > 1:
        return None
    forms = TOLD if low.told == "auto" or call.told is None else (low.told, *TOLD)
    if forms[0] == low.told == "mask" and call.score is None:
        return "mask"  # which torch's attention always takes, at whatever speed
    return next((form for form in forms if _takes(low, call, form)), None)


def emit_form(low: Lowering, call: Call, form: str) -> tuple[fx.Node, fx.Node | None]:
    """`call` in a form that it can take: its output, and its scores where it makes some."""
    node, (q, k, v) = call.node, call.operands
    scales, *around = (None, *call.around) if call.told is None else call.told[:3]
    if form == "kernel":
        told = (call.mask, scales, call.scale, call.score or "none", *around, [])
        made = low.call(node, low.kernels.attend, q, k, v, *told)
        return low.item(made, 0), low.item(made, 1)
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
    if form != "kernel":
        return _stock(low, call, form) is not None
    keys, *sizes = call.sizes
    least, most = low.kernels.heads
    # float32 is for cores without tensors there: beside torch's own it holds for few keys only.
    many = call.dtype == torch.float32 and keys > _MOST_SINGLE
    return least <= min(sizes) and max(sizes) <= most and not many and (call.scale is None or call.scale > 0)


def _stock(low: Lowering, call: Call, form: str) -> tuple[str, int] | None:
    """The kernel of torch's that computes `call` in one of its two forms, and how many features of values it wants for that."""
    q, k, _ = map(shape_of, call.operands)
    keys, head, values = call.sizes
    least, most = low.kernels.heads
    # Scores are those of self-attention, by a kernel that is made for such heads.
    scored = call.score is None or (call.score != "none" and q == k and least <= head <= most)
    if low.stock is None or call.mask is not None or not scored:
        return None
    if form == "channel" and call.told is None:
        return None
    wider = head + CHANNELS if form == "channel" else head
    for taken in (values, wider):
        kernel = low.stock.choice(wider, taken, keys, call.dtype, masked=form == "mask" and call.told is not None)
        if kernel is not None and taken >= values:
            return kernel, taken
    return None
