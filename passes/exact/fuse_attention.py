"""Exact: attention that is spelled out becomes `aten.scaled_dot_product_attention`.

    softmax(q·kᵀ [· scale] [+ bias], -1) · v        ->   scaled_dot_product_attention(q, k, v, bias, scale=…)

It may be spelled in many ways: `read_softmax` and `read_logits` say which. Scales, biases, masks and views may stand
between the product and the softmax in any order, and the products may be matmul, bmm over merged heads, or einsum.
Where anything else reads or changes the attention map (talking heads, gates, caps, dropout that is on, a caller who
wants it), the function is a different one and the graph is kept.

Fused attention computes the softmax in float32, so in lower precision it is the more accurate of the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph import edit
from gtp_fx.graph.operators import MATRIX_PRODUCTS
from gtp_fx.graph.symbols import shape_of, written
from gtp_fx.passes.exact.attention_layout import layout_of, merged_heads
from gtp_fx.passes.exact.build_attention import Sized, broadcast, build_operands, can_be_built, seen_as, spread
from gtp_fx.passes.exact.drop_trivial_masks import known_values
from gtp_fx.passes.exact.read_logits import Logits, read_logits
from gtp_fx.passes.exact.read_softmax import read_softmax
from gtp_fx.types.axes import is_plain
from gtp_fx.types.infer import WholeTyping, infer_types

Known = Mapping[Any, Tensor]
"""Values that depend on no input, for one image."""


def fuse_attention(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of `gm` in which every plain attention is `aten.scaled_dot_product_attention`.

    Heads have a dimension of their own in it. `gm` itself is returned where that holds already.
    """
    changed = any(map(_is_to_change, gm.graph.nodes))
    if not changed and not any(map(_weighs, gm.graph.nodes)):
        return gm
    given, gm = gm, edit.copy_of(gm)
    typing = infer_types(gm.graph)
    known = known_values(gm.graph)
    for node in list(gm.graph.nodes):
        if node.target is aten.scaled_dot_product_attention.default:
            _repeat_shared(gm.graph, node)
            _separate_heads(gm.graph, node, typing)
        logits = _read(node, typing)
        if logits is not None and can_be_built(logits, known):
            changed |= _replace(gm.graph, node, logits, typing, known)
    return edit.finish(gm) if changed else given


def _weighs(node: fx.Node) -> bool:
    """Tell whether a node is a product with a softmax, of whatever logits."""
    return node.target in MATRIX_PRODUCTS and read_softmax(node.args[0]) is not None


def _is_to_change(node: fx.Node) -> bool:
    """Tell whether a node is the operator with grouped queries, or with heads that may be merged with the images."""
    if node.target is not aten.scaled_dot_product_attention.default:
        return False
    return bool(node.kwargs.get("enable_gqa")) or len(shape_of(node)) == 3


def _repeat_shared(graph: fx.Graph, attention: fx.Node) -> None:
    """Repeat keys and values that several heads of queries share (`enable_gqa`), so that each head has its own."""
    if not attention.kwargs.get("enable_gqa"):
        return
    operands: Any = attention.args[:3]
    q, *shared = operands
    heads = shape_of(q)[-3]
    with graph.inserting_before(attention):
        for place, few in enumerate(shared, start=1):
            times = heads // shape_of(few)[-3]
            each = edit.call(graph, aten.repeat_interleave.self_int, few, times, -3, like=attention)
            each.meta["val"] = few.meta["val"].repeat_interleave(times, dim=-3)
            attention.update_arg(place, each)
    attention.kwargs = {name: value for name, value in attention.kwargs.items() if name != "enable_gqa"}


def _read(product: fx.Node, typing: WholeTyping) -> Logits | None:
    """Return the logits of the attention that ends in this product; None where none does, or none as the operator."""
    if product.target not in MATRIX_PRODUCTS:
        return None
    weights, value = product.args[:2]
    read = read_softmax(weights)
    logits = read_logits(read, lambda k_transposed: _runs_over_tokens(k_transposed, typing))
    if logits is None or not isinstance(value, fx.Node):
        return None
    seen, lead = shape_of(weights), shape_of(logits.product)[:-2]  # type: ignore[arg-type]
    operands = (logits.q, logits.k_transposed, *(factor.value for factor in logits.factors))
    fits = seen[-2:] == shape_of(logits.product)[-2:] == logits.shape[-2:] and seen[:-2] == shape_of(product)[:-2]
    own_lead = shape_of(logits.q)[:-2] == lead and all(broadcast(shape_of(x)[:-2], lead) == lead for x in operands)
    return logits if fits and own_lead and lead else None


def _runs_over_tokens(k_transposed: fx.Node, typing: WholeTyping) -> bool:
    """Return whether the last dimension is one of tokens, as far as the types show."""
    kind = typing.types.get(k_transposed)
    return isinstance(kind, tuple) and not is_plain(kind[-1])


def _replace(graph: fx.Graph, product: fx.Node, logits: Logits, typing: WholeTyping, known: Known) -> bool:
    """Replace the attention that ends in `product` by the operator, with heads in a dimension of their own.

    Return whether it was done: not where heads can't be told from images.
    """
    value: Any = product.args[1]
    layout = layout_of(logits.q, value, typing)
    if layout is None:
        return False
    lead, seen = layout.lead, shape_of(product)[:-2]
    dtype, own = (node.meta["val"].dtype for node in (logits.q, value))
    with graph.inserting_before(product):
        emit = edit.Emitter(graph, like=product)
        operands = build_operands(emit, logits, known)
        # The operator computes in one type: in the logits', which may be the larger.
        values = Sized(value if own == dtype else emit(aten.to.dtype, value, dtype), shape_of(value))
        tail = values.shape[-2:]
        values = seen_as(emit, values, (*seen, *tail), (*lead, *tail), logits.q)
        # Keys and values that all heads share are repeated, so that each head has its own.
        each = [spread(emit, x, lead, logits.q) for x in (operands.query, operands.key, values)]
        mask = None if operands.mask is None else layout.arranged(emit, operands.mask, logits.q)
        arranged = [layout.arranged(emit, x, logits.q) for x in each]
        attention = emit(aten.scaled_dot_product_attention.default, *arranged, mask)
        attention.kwargs = {"scale": logits.scale}
        attention = layout.restored(emit, attention, shape_of(product)[-2:])
        if seen != lead:
            attention = emit(aten.reshape.default, attention, written(shape_of(product)))
        if own != dtype:
            attention = emit(aten.to.dtype, attention, own)
        edit.replace(product, attention)
    return True


def _separate_heads(graph: fx.Graph, attention: fx.Node, typing: WholeTyping) -> None:
    """Give heads a dimension of their own in attention over [images * heads, tokens, features]."""
    arguments: tuple[Any, ...] = attention.args
    q, k, v, *rest = arguments
    if {len(shape_of(x)) for x in (q, k, v)} != {3} or (
        heads := merged_heads(q, typing) or merged_heads(v, typing)
    ) is None:
        return
    shape = shape_of(attention)
    with graph.inserting_before(attention):

        def split_heads(x: Any) -> Any:
            """Reshape [images * heads, …] to [images, heads, …], and [1, …] to [1, 1, …]."""
            if not isinstance(x, fx.Node) or len(shape_of(x)) < 3:
                return x
            sizes = [1, 1] if shape_of(x)[0] == 1 else [-1, heads]
            return edit.call(graph, aten.reshape.default, x, [*sizes, *shape_of(x)[1:]], like=attention)

        separate = [split_heads(x) for x in (q, k, v, *rest[:1])]
        new = edit.call(graph, attention.target, *separate, *rest[1:], like=attention)
        new.kwargs = {name: split_heads(x) if name == "attn_mask" else x for name, x in attention.kwargs.items()}
        merged = edit.call(graph, aten.reshape.default, new, [-1, *shape[1:]], like=attention)
    edit.replace(attention, merged)
