"""Exact: attention that is spelled out becomes `aten.scaled_dot_product_attention`.

    softmax(q·kᵀ [· scale] [+ bias], -1) · v        ->   scaled_dot_product_attention(q, k, v, bias, scale=…)

It may be spelled in many ways. The scale may be applied before or after the product, as a number or per head, to q or
to the logits. Biases and masks may be added in any order, also one for each window of an image. The products may be
matmul, bmm over merged heads, or einsum. Where anything else reads or changes the attention map (talking heads, gates,
dropout that is on, a caller who wants it), the function is a different one and the graph is kept.

Fused attention computes the softmax in float32, so in lower precision it is the more accurate of the two.
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

_NUMBER_PRESERVING = (*CASTS, aten.type_as.default, aten.contiguous.default)


@dataclass(frozen=True)
class Logits:
    """Logits of an attention: q·kᵀ·scale·factors + biases.

    q: the queries, [..., tokens, features].
    k_transposed: the transposed keys, [..., features, tokens].
    scale: the product of all numbers that multiply the logits.
    factors: tensors that multiply the logits, constant along both token axes.
    biases: tensors that are added, each with the number by which it is multiplied. One with five dimensions,
        [1, windows, heads or 1, queries, keys], has a mask for each window; the product's first dimension is then
        images * windows.
    """

    q: fx.Node
    k_transposed: fx.Node
    scale: float = 1.0
    factors: tuple[fx.Node, ...] = ()
    biases: tuple[tuple[fx.Node, float], ...] = ()


def fuse_attention(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of `gm` in which every plain attention is `aten.scaled_dot_product_attention`.

    Heads have a dimension of their own in it. `gm` itself is returned where that holds already.
    """
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
    """Tell whether a node is the operator with grouped queries, or with heads that may be merged with the images."""
    if node.target is not aten.scaled_dot_product_attention.default:
        return False
    return bool(node.kwargs.get("enable_gqa")) or len(shape_of(node)) == 3


def _spelled_out(product: fx.Node) -> Logits | None:
    """Return the logits of the attention that ends in this product; None where none does."""
    if product.target not in MATRIX_PRODUCTS or not isinstance(product.args[0], fx.Node):
        return None
    softmax = _softmax_before(product.args[0])
    logits = None if softmax is None else _logits(softmax.args[0])
    return logits if logits is not None and _same_rank(logits, product) else None


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


def _softmax_before(node: fx.Node) -> fx.Node | None:
    """Return the softmax over the last dimension that `node` is, through casts; None where anything else reads it."""
    while node.target in _NUMBER_PRESERVING and len(node.users) == 1:
        node = node.all_input_nodes[0]
    if node.target not in SOFTMAXES or len(node.users) != 1:
        return None
    return node if node.args[1] in (-1, len(shape_of(node)) - 1) else None


def _logits(node: Any) -> Logits | None:
    """Parse `node` as a product of queries and keys, scaled and biased; None where it is something else."""
    if not isinstance(node, fx.Node) or len(node.users) != 1:
        return None
    if node.target in MATRIX_PRODUCTS:
        q, k_transposed = node.args
        return Logits(q, k_transposed)  # type: ignore[arg-type]
    if node.target in _NUMBER_PRESERVING:
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
    """Parse logits [images * windows, …] that are reshaped to [images, windows, …], masked, and reshaped back.

    node: the second reshape. None where it is something else.
    """
    masks: list[fx.Node] = []
    # Go backward through the added masks to the first reshape.
    split = node.args[0]
    while isinstance(split, fx.Node) and split.target is aten.add.Tensor and not split.kwargs and len(split.users) == 1:
        sides = [(x, mask) for x, mask in (split.args, split.args[::-1]) if _is_window_mask(mask, split, node)]
        if not sides:
            return None
        split, mask = sides[0]
        masks.append(mask)  # type: ignore[arg-type]
    if not isinstance(split, fx.Node) or not masks or split.target is not aten.reshape.default or len(split.users) != 1:
        return None
    inner = split.args[0]
    found = _logits(inner) if isinstance(inner, fx.Node) and shape_of(inner) == shape_of(node) else None
    return None if found is None else replace(found, biases=(*found.biases, *((mask, 1.0) for mask in masks)))


def _is_window_mask(mask: Any, total: fx.Node, logits: fx.Node) -> bool:
    """Tell whether `mask` is [1, windows, heads or 1, queries, keys], with the sizes of the sum it is added in."""
    if not isinstance(mask, fx.Node) or len(shape_of(mask)) != 5 or len(shape_of(total)) != 5:
        return False
    one, windows, heads, *rest = shape_of(mask)
    return (one, windows, *rest) == (1, shape_of(total)[1], *shape_of(logits)[2:]) and heads in (1, shape_of(logits)[1])


def _scaled(node: fx.Node) -> Logits | None:
    """Parse logits that are multiplied or divided by a number, or multiplied by a tensor; None for anything else."""
    inner, factor = node.args
    divides = node.target in DIVISIONS
    # A product's operands may be in either order.
    if isinstance(factor, fx.Node) and _logits(inner) is None and not divides:
        inner, factor = factor, inner
    found = _logits(inner)
    if found is None:
        return None
    if isinstance(factor, int | float):
        by = 1 / factor if divides else factor
        biases = tuple((bias, times * by) for bias, times in found.biases)
        return Logits(found.q, found.k_transposed, found.scale * by, found.factors, biases)
    # A tensor has to be constant along both token axes, and can't be moved to q past a bias.
    if divides or found.biases or not isinstance(factor, fx.Node) or shape_of(factor)[-2:] not in ((), (1,), (1, 1)):
        return None
    return Logits(found.q, found.k_transposed, found.scale, (*found.factors, factor))


def _same_rank(logits: Logits, product: fx.Node) -> bool:
    """Tell whether queries, keys and values are batched, and have the same leading dimensions."""
    shapes = [shape_of(logits.q), shape_of(logits.k_transposed), shape_of(product.args[1])]  # type: ignore[arg-type]
    return len(shapes[0]) in (3, 4) and len({shape[:-2] for shape in shapes}) == 1


def _replace(graph: fx.Graph, product: fx.Node, logits: Logits, typing: WholeTyping) -> None:
    """Replace the attention that ends in `product` by the operator, with heads in a dimension of their own."""
    merged = len(shape_of(logits.q)) == 3
    heads = _merged_heads(logits.q, typing) or _merged_heads(product.args[1], typing) if merged else None  # type: ignore[arg-type]
    if merged and heads is None:
        return  # heads can't be distinguished from images, and a site needs that
    with graph.inserting_before(product):
        call = edit.Emitter(graph, like=product)

        def split_heads(x: fx.Node, shape: tuple[int, ...]) -> fx.Node:
            """Reshape [images * heads, …] to [images, heads, …]; what all share has neither and broadcasts."""
            shared = heads is None or len(shape) < 3 or shape[0] == 1
            return x if shared else call(aten.reshape.default, x, [-1, heads, *shape[1:]])

        def by_window(mask: fx.Node, shape: tuple[int, ...]) -> fx.Node:
            """Expand and reshape [1, windows, …] to [images * windows, …]."""
            rows: Any = shape_of(logits.q)[0]
            if is_symbolic(rows):
                rows = call(aten.sym_size.int, logits.q, 0)
                images: Any = call(operator.floordiv, rows, shape[1])
            else:
                images = rows // shape[1]
            expanded = call(aten.expand.default, mask, [images, *shape[1:]])
            return call(aten.reshape.default, expanded, [-1, *shape[2:]])

        # Factors move to the queries; the operator takes the number as its scale.
        query = logits.q
        for factor in logits.factors:
            query = call(aten.mul.Tensor, query, factor)
        key, key_shape = _transposed(logits.k_transposed, call)
        value: Any = product.args[1]
        # All biases and masks become one, in the logits' dimensions and dtype.
        bias = None
        for found, times in logits.biases:
            one = found if times == 1.0 else call(aten.mul.Tensor, found, times)
            one = by_window(one, shape_of(found)) if len(shape_of(found)) == 5 else one
            one = split_heads(one, shape_of(found)) if len(shape_of(found)) == 3 else one
            bias = one if bias is None else call(aten.add.Tensor, bias, one)
        dtype = logits.q.meta["val"].dtype
        if any(found.meta["val"].dtype != dtype for found, _ in logits.biases):
            bias = call(aten.to.dtype, bias, dtype)
        operands = [
            split_heads(query, shape_of(logits.q)),
            split_heads(key, key_shape),
            split_heads(value, shape_of(value)),
        ]
        attention = call(aten.scaled_dot_product_attention.default, *operands, bias)
        attention.kwargs = {"scale": logits.scale}
        if heads is not None:
            attention = call(aten.reshape.default, attention, [-1, *shape_of(product)[1:]])
    product.replace_all_uses_with(attention)
    graph.erase_node(product)


def _separate_heads(graph: fx.Graph, attention: fx.Node, typing: WholeTyping) -> None:
    """Give heads a dimension of their own in attention over [images * heads, tokens, features]."""
    arguments: tuple[Any, ...] = attention.args
    q, k, v, *rest = arguments
    if {len(shape_of(x)) for x in (q, k, v)} != {3} or (
        heads := _merged_heads(q, typing) or _merged_heads(v, typing)
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
    attention.replace_all_uses_with(merged)
    graph.erase_node(attention)


def _merged_heads(q: fx.Node, typing: WholeTyping) -> int | None:
    """Return the heads of q [images * heads, tokens, features], from its type; None where the type doesn't show them.

    The type has the first dimension's factors, as the view that merged them had. Heads might come before the images, so
    the outer factor has to be known as the images.
    """
    kind = typing.types.get(q)
    if not isinstance(kind, tuple):
        return None
    images, *rest = kind[0]
    known = (
        images.images if holds_images(kind[0]) and isinstance(images, Plain) else images.whole_size in _images(typing)
    )
    if _batch_of_one(typing) and not holds_images(kind[0]):
        known, rest = True, list(kind[0])  # a batch of one doesn't appear in a type
    if not known:
        return None
    while rest and not isinstance(rest[0], Plain):  # skip the windows, which are between images and heads
        rest = rest[1:]
    return math.prod(factor.whole_size for factor in rest) if all(isinstance(f, Plain) for f in rest) else None


def _batch_of_one(typing: WholeTyping) -> bool:
    """Tell whether every dimension of images in the graph has size 1."""
    kinds = [kind for kind in typing.types.values() if isinstance(kind, tuple)]
    sizes = {f.size for kind in kinds for dim in kind for f in dim if isinstance(f, Plain) and f.images}
    return sizes == {1}


def _images(typing: WholeTyping) -> set[int]:
    """Return the batch sizes of values over patch grids."""
    kinds = [kind for kind in typing.types.values() if isinstance(kind, tuple)]
    return {whole_size(kind[0]) for kind in kinds if any(isinstance(f, GridAxis) for dim in kind for f in dim)}


def _transposed(node: fx.Node, call: Any) -> tuple[fx.Node, tuple[int, ...]]:
    """Transpose the last two dimensions of `node`, or undo its transpose; return the result and its shape."""
    shape = shape_of(node)
    rank = len(shape)
    turned = (*shape[:-2], shape[-1], shape[-2])
    if node.target is aten.transpose.int and {d % rank for d in node.args[1:]} == {rank - 2, rank - 1}:  # type: ignore[operator]
        return node.args[0], turned  # type: ignore[return-value]
    return call(aten.transpose.int, node, -2, -1), turned
