"""Attention that scores its tokens, or is told their scales: as stock attention where that can be, else as a kernel."""

from __future__ import annotations

from torch import fx

from gtp_fx.passes.lower.attention_forms import Call, emit_form, form_of
from gtp_fx.passes.lower.lowering import Lowering


def lower_attention(low: Lowering, node: fx.Node) -> None:
    """Stock attention, which keeps its kernel where it is told no scales, or takes them as its mask at speed."""
    options = dict(zip(("attn_mask", "dropout_p", "is_causal"), node.args[3:], strict=False)) | dict(node.kwargs)
    if any(options.get(option) for option in ("dropout_p", "is_causal", "enable_gqa")):
        return
    call = Call(node, options.get("attn_mask"), options.get("scale"))
    if call.told is None:
        return
    form = form_of(low, call)
    if form not in (None, "mask"):
        output, _ = emit_form(low, call, form)  # type: ignore[arg-type]
        low.swap(node, output)


def lower_scored_attention(low: Lowering, node: fx.Node) -> None:
    """All but theta below 1, which ranks whole maps: they have to be in memory, so it stays plain ATen."""
    _, _, _, bias, scale, sparsity, score, prefix, suffix = node.args
    if sparsity != 1.0:
        return
    call = Call(node, bias, scale, score, (prefix, suffix))
    form = form_of(low, call)
    if form is not None:
        results = emit_form(low, call, form)
        for item in list(node.users):
            low.swap(item, results[item.args[1]])  # type: ignore[index, arg-type]
