"""Lowering of attention that scores tokens or reads token scales: to stock attention if possible, else to a kernel."""

from __future__ import annotations

from torch import fx

from gtp_fx.passes.lower.attention_forms import Call, emit_form, form_of
from gtp_fx.passes.lower.lowering import Lowering


def lower_attention(low: Lowering, node: fx.Node) -> None:
    """Lower attention that makes no scores.

    It remains stock attention where it reads no token scales, or can take them as its mask at full speed.
    """
    options = dict(zip(("attn_mask", "dropout_p", "is_causal"), node.args[3:], strict=False)) | dict(node.kwargs)
    if any(options.get(option) for option in ("dropout_p", "is_causal", "enable_gqa")):
        return
    call = Call(node, options.get("attn_mask"), options.get("scale"))
    if call.scales is None:
        return
    form = form_of(low, call)
    if form not in (None, "mask"):
        output, _ = emit_form(low, call, form)  # type: ignore[arg-type]
        low.swap(node, output)


def lower_scored_attention(low: Lowering, node: fx.Node) -> None:
    """Lower attention that scores its tokens.

    With theta below 1 it stays plain ATen, because theta ranks whole attention maps, which have to be in memory. So
    does attention with keys that are no tokens, whose map isn't square.
    """
    _, _, _, bias, scale, sparsity, score, prefix, suffix, *beside = node.args
    if sparsity != 1.0 or beside:
        return
    call = Call(node, bias, scale, score, (prefix, suffix))
    form = form_of(low, call)
    if form is not None:
        results = emit_form(low, call, form)
        for item in list(node.users):
            low.swap(item, results[item.args[1]])  # type: ignore[index, arg-type]
