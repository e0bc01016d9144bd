"""Approximate: the attention of kept tokens alone, each to all tokens of its window. `insert_branches` asks for it.

1. queries of the kept tokens: made of their rows of the projection's input, or taken where all have to be made;
2. attention as before, with the rows of the bias that are theirs;
3. what follows up to the residual add, on those rows;
4. the others get their neighbours' results, and all is arranged as it was.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx
from torch.ops import aten, gtp_fx  # type: ignore[import-not-found]

from gtp_fx import graphs
from gtp_fx.attention_half import AttentionHalf, data_of
from gtp_fx.axes import Plain, TensorType, whole_size
from gtp_fx.branches import Branch
from gtp_fx.features import named
from gtp_fx.infer import Typing
from gtp_fx.layouts import arrange, convert
from gtp_fx.queries import Fused
from gtp_fx.rules.layout import is_view
from gtp_fx.sizes import shape_of
from gtp_fx.strategies.protocol import Attention, Emit

_ROWS, _IMAGES = 1, 0
"""In the layout by window, [images and windows, tokens, features]."""


def insert_partial(
    graph: fx.Graph,
    attention: fx.Node,
    branch: Branch,
    half: AttentionHalf,
    chosen: tuple[fx.Node, fx.Node, fx.Node],
    skipping: int,
    typing: Typing,
) -> None:
    """Put the attention half of kept tokens in the place of the whole.

    chosen: kept [R, K], left [R, P] and shares [R, P, K], R images and windows, which stand behind `half.result`.
    """
    was = Attention.of(attention)
    kept, left, shares = chosen
    rows, tokens = (Plain(whole_size(branch.region[0]), images=True),), (Plain(branch.tokens - skipping),)

    def call(target: Any, *args: Any) -> fx.Node:
        return graphs.call(graph, target, *args, like=attention)

    with graph.inserting_before(shares.next):
        asking = _queries(graph, was, branch, half, kept, (rows, tokens), typing)
        k, v = (heads_first(call, x, branch, typing) for x in (was.k, was.v))
        made = call(aten.scaled_dot_product_attention.default, asking, k, v, _rows_of_bias(call, was.bias, kept))
        made.kwargs = {} if was.scale is None else {"scale": was.scale}
        by_head: TensorType = (rows, half.answers[branch.heads], tokens, half.answers[-1])
        made = arrange(call, made, by_head, (rows, tokens, half.gathered))
        for node in half.inside:
            made = _copied(graph, node, {data_of(node, typing): made})
        result = call(gtp_fx.recover.default, made, shares, kept, left, _IMAGES, _ROWS, 0, 0)
        kind = typing.type(half.result)
        arranged = convert(call, result, (*branch.region, kind[-1]), kind)
    half.result.replace_all_uses_with(arranged)
    if half.projection is None:
        return
    for size, dim in half.projection.sizes:
        graphs.set_args(size, (half.projection.linear.args[0], dim))
    if half.projection.fused is not None:
        _leave_queries_out(graph, half.projection.linear, half.projection.fused)


def heads_first(call: Emit, x: fx.Node, branch: Branch, typing: Typing) -> fx.Node:
    """[images, windows, heads, tokens, features] in any order -> [images * windows, heads, tokens, features]."""
    order = branch.order
    if order == (0, 1, 2, 3):
        return x
    sizes = [whole_size(typing.type(x)[d]) for d in order[-3:]]
    return call(aten.reshape.default, call(aten.permute.default, x, list(order)), [-1, *sizes])


def _queries(
    graph: fx.Graph,
    was: Attention,
    branch: Branch,
    half: AttentionHalf,
    kept: fx.Node,
    layout: TensorType,
    typing: Typing,
) -> fx.Node:
    """[R, H, K, D] of the kept tokens."""
    heads, features = half.asks[branch.heads], half.asks[-1]
    projection = half.projection
    like = was.q if projection is None else projection.linear

    def call(target: Any, *args: Any) -> fx.Node:
        return graphs.call(graph, target, *args, like=like)

    if projection is None:
        whole = arrange(call, was.q, half.asks, (branch.region[0], heads, branch.region[1], features))
        return call(gtp_fx.take_tokens.default, whole, kept, _IMAGES, 2, 0, 0)
    x, *parameters = projection.linear.args
    kind = typing.type(projection.entry)
    by_window = convert(call, x, kind, (*branch.region, kind[-1]))
    taken = call(gtp_fx.take_tokens.default, by_window, kept, _IMAGES, _ROWS, 0, 0)
    own = [_rows_of(call, parameter, projection.fused, queries=True) for parameter in parameters]
    made = call(aten.linear.default, taken, *own)
    kind = named((*layout, (Plain(projection.features.shape[0]),)), [2], projection.features)
    made = arrange(call, made, kind, (layout[0], heads, layout[1], features))
    instead: dict[fx.Node, fx.Node] = {projection.source: made}
    for node in projection.computes:
        # A value that is repeated along the features of each head broadcasts there as it is.
        repeats = node.target is aten.expand.default
        instead[node] = instead[node.args[0]] if repeats else _copied(graph, node, instead)  # type: ignore[index]
    return instead[(projection.source, *projection.computes)[-1]]


def _rows_of(call: Emit, parameter: Any, fused: Fused | None, queries: bool) -> Any:
    """The rows of a fused weight (or bias) that make the queries, or those that make the others: views of the parameter."""
    if parameter is None or fused is None:
        return parameter
    count, *rest = shape_of(parameter)
    whole = fused.parts * fused.stride
    start, stop = (0, fused.stride) if queries else (fused.stride, whole)
    if count == whole:
        return call(aten.slice.Tensor, parameter, 0, start, stop)
    rows = call(aten.slice.Tensor, call(aten.reshape.default, parameter, [-1, whole, *rest]), 1, start, stop)
    return call(aten.reshape.default, rows, [-1, *rest])


def _leave_queries_out(graph: fx.Graph, linear: fx.Node, fused: Fused) -> None:
    """Exact: a fused projection without its first part, which nothing but the whole queries reads any more."""

    def call(target: Any, *args: Any, like: fx.Node = linear) -> fx.Node:
        return graphs.call(graph, target, *args, like=like)

    left = fused.parts - 1
    with graph.inserting_before(fused.splitter):
        x, *parameters = linear.args
        own = [_rows_of(call, parameter, fused, queries=False) for parameter in parameters]
        value = call(aten.linear.default, x, *own)
        for move, dim in fused.moves:
            args = list(move.args[1:])
            if is_view(move):
                sizes = list(args[0])  # type: ignore[arg-type]
                if dim is not None and sizes[dim] != -1:
                    sizes[dim] = shape_of(move)[dim] // fused.parts * left
                args[0] = sizes
            value = call(move.target, value, *args, like=move)
        args = list(fused.splitter.args[1:])
        if fused.splitter.target is aten.split_with_sizes.default:
            args[0] = list(args[0])[1:]  # type: ignore[arg-type]
        elif fused.splitter.target is aten.chunk.default:
            args[0] = left
        parts = call(fused.splitter.target, value, *args, like=fused.splitter)
        for index, item in fused.items.items():
            if index:
                item.replace_all_uses_with(call(operator.getitem, parts, index - 1, like=item))


def _rows_of_bias(call: Emit, bias: fx.Node | None, kept: fx.Node) -> fx.Node | None:
    """[R or 1, H or 1, N or 1, M] -> the rows of the kept queries."""
    if bias is None or len(shape_of(bias)) < 2 or shape_of(bias)[-2] == 1:
        return bias
    for _ in range(4 - len(shape_of(bias))):
        bias = call(aten.unsqueeze.default, bias, 0)
    return call(gtp_fx.take_tokens.default, bias, kept, _IMAGES, 2, 0, 0)


def _copied(graph: fx.Graph, node: fx.Node, instead: dict[fx.Node, fx.Node]) -> fx.Node:
    copy = graph.node_copy(node, lambda n: instead.get(n, n))
    copy.meta = {key: node.meta[key] for key in graphs.META_KEYS if key in node.meta}
    return copy
