"""Exact: attention that is spelled out becomes the one operator that it is.

    softmax(q·kᵀ [· scale] [+ bias], -1) · v        ->   scaled_dot_product_attention(q, k, v, bias, scale=…)

in any of its spellings: the scale before or behind the product, as a number or per head, on q or on the logits; a bias or a mask
added, in any order, also one for each window of an image; matmul, bmm over merged heads, or einsum. Where anything else reads the map or changes it (talking
heads, gates, dropout that is on, a caller who wants it), it is another function and stays as it is.

Fused attention computes the softmax in float32 inside; below float32 it is the more exact of the two.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph import edit
from gtp_fx.graph.operators import CASTS, DIVISIONS, MATRIX_PRODUCTS, SCALINGS, SOFTMAXES
from gtp_fx.graph.symbols import is_symbolic, shape_of
from gtp_fx.types.axes import GridAxis, Plain, holds_images, whole_size
from gtp_fx.types.infer import WholeTyping, infer_types

_KEEPING_NUMBERS = (*CASTS, aten.type_as.default, aten.contiguous.default)


@dataclass(frozen=True)
class Logits:
    """q·kᵀ·scale·factors + biases, as found: factors are tensors that are constant along both token axes.

    biases: each with the number by which it is multiplied. One of five dimensions, [1, windows, heads or 1, queries, keys], is for
    each window, where the product's first dimension is images * windows.
    """

    q: fx.Node
    k_transposed: fx.Node
    scale: float = 1.0
    factors: tuple[fx.Node, ...] = ()
    biases: tuple[tuple[fx.Node, float], ...] = ()


def fuse_attention(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of `gm` in which every plain attention is `aten.scaled_dot_product_attention`, heads apart; `gm` itself where it is."""
    if not any(_is_to_change(node) or _spelled_out(node) for node in gm.graph.nodes):
        return gm
    gm = edit.copy_of(gm)
    typing = infer_types(gm.graph)
    for node in list(gm.graph.nodes):
        if node.target is aten.scaled_dot_product_attention.default:
            _repeat_shared(gm.graph, node)
            _separate_heads(gm.graph, node, typing)
        logits = _spelled_out(node)
        if logits is not None:
            _replace(gm.graph, node, logits, typing)
    return edit.finish(gm)


def _is_to_change(node: fx.Node) -> bool:
    """The operator already, with keys that queries share or heads that may be among the images."""
    if node.target is not aten.scaled_dot_product_attention.default:
        return False
    return bool(node.kwargs.get("enable_gqa")) or len(shape_of(node)) == 3


def _spelled_out(product: fx.Node) -> Logits | None:
    """The logits of the attention that ends in this product, None where none does."""
    if product.target not in MATRIX_PRODUCTS or not isinstance(product.args[0], fx.Node):
        return None
    softmax = _softmax_before(product.args[0])
    logits = None if softmax is None else _logits(softmax.args[0])
    return logits if logits is not None and _same_rank(logits, product) else None


def _repeat_shared(graph: fx.Graph, attention: fx.Node) -> None:
    """Grouped queries, several heads of which share a key's: each gets its own, as without `enable_gqa`."""
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


def _softmax_before(node: fx.Node) -> fx.Node | None:
    """The softmax over the last dimension that `node` is, through casts, where nothing else reads it."""
    while node.target in _KEEPING_NUMBERS and len(node.users) == 1:
        node = node.all_input_nodes[0]
    if node.target not in SOFTMAXES or len(node.users) != 1:
        return None
    return node if node.args[1] in (-1, len(shape_of(node)) - 1) else None


def _logits(node: Any) -> Logits | None:
    """What `node` is, if it is a product of queries and keys, scaled and biased."""
    if not isinstance(node, fx.Node) or len(node.users) != 1:
        return None
    if node.target in MATRIX_PRODUCTS:
        q, k_transposed = node.args
        return Logits(q, k_transposed)  # type: ignore[arg-type]
    if node.target in _KEEPING_NUMBERS:
        return _logits(node.args[0])
    if node.target in SCALINGS:
        return _scaled(node)
    if node.target is aten.reshape.default:
        return _masked_by_window(node)
    if node.target is aten.add.Tensor and not node.kwargs:
        for inner, bias in (node.args, node.args[::-1]):
            found = _logits(inner)
            if found is not None and isinstance(bias, fx.Node):
                return replace(found, biases=(*found.biases, (bias, 1.0)))
    return None


def _masked_by_window(node: fx.Node) -> Logits | None:
    """Logits [images * windows, …] seen as [images, windows, …], a mask for each window added, and seen as before."""
    masks: list[fx.Node] = []
    apart = node.args[0]
    while isinstance(apart, fx.Node) and apart.target is aten.add.Tensor and not apart.kwargs and len(apart.users) == 1:
        sides = [(x, mask) for x, mask in (apart.args, apart.args[::-1]) if _is_window_mask(mask, apart, node)]
        if not sides:
            return None
        apart, mask = sides[0]
        masks.append(mask)  # type: ignore[arg-type]
    if not isinstance(apart, fx.Node) or not masks or apart.target is not aten.reshape.default or len(apart.users) != 1:
        return None
    inner = apart.args[0]
    found = _logits(inner) if isinstance(inner, fx.Node) and shape_of(inner) == shape_of(node) else None
    return None if found is None else replace(found, biases=(*found.biases, *((mask, 1.0) for mask in masks)))


def _is_window_mask(mask: Any, total: fx.Node, logits: fx.Node) -> bool:
    """[1, windows, heads or 1, queries, keys] beside [images, windows, heads, queries, keys]."""
    if not isinstance(mask, fx.Node) or len(shape_of(mask)) != 5 or len(shape_of(total)) != 5:
        return False
    one, windows, heads, *rest = shape_of(mask)
    return (one, windows, *rest) == (1, shape_of(total)[1], *shape_of(logits)[2:]) and heads in (1, shape_of(logits)[1])


def _scaled(node: fx.Node) -> Logits | None:
    inner, factor = node.args
    divides = node.target in DIVISIONS
    if isinstance(factor, fx.Node) and _logits(inner) is None and not divides:
        inner, factor = factor, inner
    found = _logits(inner)
    if found is None:
        return None
    if isinstance(factor, int | float):
        by = 1 / factor if divides else factor
        biases = tuple((bias, times * by) for bias, times in found.biases)
        return Logits(found.q, found.k_transposed, found.scale * by, found.factors, biases)
    if divides or found.biases or not isinstance(factor, fx.Node) or shape_of(factor)[-2:] not in ((), (1,), (1, 1)):
        return None
    return Logits(found.q, found.k_transposed, found.scale, (*found.factors, factor))


def _same_rank(logits: Logits, product: fx.Node) -> bool:
    """Batched queries, keys and values, each [..., tokens, features], with the same leading dimensions."""
    shapes = [shape_of(logits.q), shape_of(logits.k_transposed), shape_of(product.args[1])]  # type: ignore[arg-type]
    return len(shapes[0]) in (3, 4) and len({shape[:-2] for shape in shapes}) == 1


def _replace(graph: fx.Graph, product: fx.Node, logits: Logits, typing: WholeTyping) -> None:
    merged = len(shape_of(logits.q)) == 3
    heads = _merged_heads(logits.q, typing) or _merged_heads(product.args[1], typing) if merged else None  # type: ignore[arg-type]
    if merged and heads is None:
        return  # no way to tell heads from images, and a site has to
    with graph.inserting_before(product):
        call = edit.Emitter(graph, like=product)

        def apart(x: fx.Node, shape: tuple[int, ...]) -> fx.Node:
            """[images * heads, …] -> [images, heads, …]; what all share has neither and broadcasts."""
            shared = heads is None or len(shape) < 3 or shape[0] == 1
            return x if shared else call(aten.reshape.default, x, [-1, heads, *shape[1:]])

        def by_window(mask: fx.Node, shape: tuple[int, ...]) -> fx.Node:
            """[1, windows, …] -> [images * windows, …]."""
            rows: Any = shape_of(logits.q)[0]
            if is_symbolic(rows):
                rows = call(aten.sym_size.int, logits.q, 0)
                images: Any = call(operator.floordiv, rows, shape[1])
            else:
                images = rows // shape[1]
            expanded = call(aten.expand.default, mask, [images, *shape[1:]])
            return call(aten.reshape.default, expanded, [-1, *shape[2:]])

        query = logits.q
        for factor in logits.factors:
            query = call(aten.mul.Tensor, query, factor)
        key, key_shape = _transposed(logits.k_transposed, call)
        value: Any = product.args[1]
        bias = None
        for found, times in logits.biases:
            one = found if times == 1.0 else call(aten.mul.Tensor, found, times)
            one = by_window(one, shape_of(found)) if len(shape_of(found)) == 5 else one
            one = apart(one, shape_of(found)) if len(shape_of(found)) == 3 else one
            bias = one if bias is None else call(aten.add.Tensor, bias, one)
        dtype = logits.q.meta["val"].dtype
        if any(found.meta["val"].dtype != dtype for found, _ in logits.biases):
            bias = call(aten.to.dtype, bias, dtype)
        operands = [apart(query, shape_of(logits.q)), apart(key, key_shape), apart(value, shape_of(value))]
        attention = call(aten.scaled_dot_product_attention.default, *operands, bias)
        attention.kwargs = {"scale": logits.scale}
        if heads is not None:
            attention = call(aten.reshape.default, attention, [-1, *shape_of(product)[1:]])
    product.replace_all_uses_with(attention)
    graph.erase_node(product)


def _separate_heads(graph: fx.Graph, attention: fx.Node, typing: WholeTyping) -> None:
    """Attention over [images * heads, tokens, features], with heads in a dimension of their own."""
    arguments: tuple[Any, ...] = attention.args
    q, k, v, *rest = arguments
    if {len(shape_of(x)) for x in (q, k, v)} != {3} or (
        heads := _merged_heads(q, typing) or _merged_heads(v, typing)
    ) is None:
        return
    shape = shape_of(attention)
    with graph.inserting_before(attention):

        def apart(x: Any) -> Any:
            if not isinstance(x, fx.Node) or len(shape_of(x)) < 3:
                return x
            sizes = [1, 1] if shape_of(x)[0] == 1 else [-1, heads]
            return edit.call(graph, aten.reshape.default, x, [*sizes, *shape_of(x)[1:]], like=attention)

        separate = [apart(x) for x in (q, k, v, *rest[:1])]
        new = edit.call(graph, attention.target, *separate, *rest[1:], like=attention)
        new.kwargs = {name: apart(x) if name == "attn_mask" else x for name, x in attention.kwargs.items()}
        merged = edit.call(graph, aten.reshape.default, new, [-1, *shape[1:]], like=attention)
    attention.replace_all_uses_with(merged)
    graph.erase_node(attention)


def _merged_heads(q: fx.Node, typing: WholeTyping) -> int | None:
    """The heads of [images * heads, tokens, features], as the view that merged them says; None where it can't be told.

    Heads that stand before the images would be taken for them, so the outer factor must be as many as the images are.
    """
    kind = typing.types.get(q)
    if not isinstance(kind, tuple):
        return None
    images, *rest = kind[0]
    known = (
        images.images if holds_images(kind[0]) and isinstance(images, Plain) else images.whole_size in _images(typing)
    )
    if _batch_of_one(typing) and not holds_images(kind[0]):
        known, rest = True, list(kind[0])  # a batch of one leaves no trace in a type
    if not known:
        return None
    while rest and not isinstance(rest[0], Plain):  # windows: each has images and heads of its own
        rest = rest[1:]
    return math.prod(factor.whole_size for factor in rest) if all(isinstance(f, Plain) for f in rest) else None


def _batch_of_one(typing: WholeTyping) -> bool:
    kinds = [kind for kind in typing.types.values() if isinstance(kind, tuple)]
    sizes = {f.size for kind in kinds for dim in kind for f in dim if isinstance(f, Plain) and f.images}
    return sizes == {1}


def _images(typing: WholeTyping) -> set[int]:
    """The batch sizes of the patch grids."""
    kinds = [kind for kind in typing.types.values() if isinstance(kind, tuple)]
    return {whole_size(kind[0]) for kind in kinds if any(isinstance(f, GridAxis) for dim in kind for f in dim)}


def _transposed(node: fx.Node, call: Any) -> tuple[fx.Node, tuple[int, ...]]:
    """`node` with its last two dimensions exchanged, without exchanging them twice; and its shape."""
    shape = shape_of(node)
    rank = len(shape)
    turned = (*shape[:-2], shape[-1], shape[-2])
    if node.target is aten.transpose.int and {d % rank for d in node.args[1:]} == {rank - 2, rank - 1}:  # type: ignore[operator]
        return node.args[0], turned  # type: ignore[return-value]
    return call(aten.transpose.int, node, -2, -1), turned
