"""Exact: residual streams that lie otherwise, such as [N, B, C] or [B, C, N], are turned to [B, N, C].

Maps [B, C, H, W] are turned to [B, H, W, C] where tokens can then skip a branch, which needs features last.

    x [N, B, C] ─ norm ─ …                x ─ permute ─ x [B, N, C] ─ norm ─ permute ─ …
    └──────── add [N, B, C]     ->        └──────────── add [B, N, C]

A stream is turned once, before its first block. From there on what follows is done in the new layout, operator by
operator, and turned back only for an operator that can't be (a view that merges tokens with images, a convolution over
neighbours). So later passes know one layout. Convolutions with a kernel of one become linear layers. An add of the
stream and a branch turns the branch's result.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.analysis.blocks import marks_of, share_in, stream_of
from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.graph import edit
from gtp_fx.graph.operators import (
    BINARY,
    CASTS_LIKE,
    CONVOLUTIONS,
    FEATURE_NORMS,
    MATRIX_PRODUCTS,
    PERMUTATIONS,
    SOFTMAXES,
    SPLITS,
    SQUEEZES,
    UNARY,
    VIEWS,
)
from gtp_fx.graph.rearrangements import order_of
from gtp_fx.graph.symbols import shape_of, written
from gtp_fx.graph.verify import propagate_shapes
from gtp_fx.types.axes import GridAxis, TensorType, holds_images, is_plain, token_axis
from gtp_fx.types.rules.spatial import is_pointwise

Order = tuple[int, ...]
"""A permutation of dimensions, as aten.permute takes it."""


def turn_streams(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of `gm`, whose blocks are marked, with residual streams [B, N, C]; `gm` itself where all are."""
    orders = _streams(gm.graph)
    rows = {stream: order for stream, order in orders.items() if len(order) == 3}
    if len(rows) < len(orders):
        turned = _turned(gm, orders)
        propagate_shapes(turned, after=turn_streams.__name__)
        if _blocks_losing_tokens(turned) > _blocks_losing_tokens(gm):
            return turned
    return _turned(gm, rows) if rows else gm


def _blocks_losing_tokens(gm: fx.GraphModule) -> int:
    """Return at how many blocks tokens can be removed or skip a branch."""
    return sum(block.refusal is None or block.branch is not None for block in typed_graph(gm.graph).blocks)


def _turned(gm: fx.GraphModule, orders: Mapping[fx.Node, Order]) -> fx.GraphModule:
    """Return a copy of `gm` with these streams turned. orders: what turns each."""
    gm, copies = edit.copy_with_nodes(gm)
    walk = _Walk(gm.graph, {node: shape_of(node) for node in gm.graph.nodes if _is_tensor(node)})
    starts = {copies[node]: order for node, order in orders.items()}
    for node in list(gm.graph.nodes):
        walk.turn(node)
        if node in starts and node not in walk.turned:
            walk.begin(node, starts[node])
    return edit.finish(gm)


def _streams(graph: fx.Graph) -> dict[fx.Node, Order]:
    """Return the streams at which tokens could be removed but for their layout, and what turns each to [B, N, C]."""
    typing = typed_graph(graph).whole
    marked = {(mark.role, mark.index): node for node, mark in marks_of(graph)}
    found: dict[fx.Node, Order] = {}
    for (role, index), site in marked.items():
        if role != "site":
            continue
        # A stream may be turned for the sum alone; then its share in that is where the other layout begins.
        attention = marked["attention", index]
        for value in (stream_of(site, attention, typing), share_in(site, attention, typing)):
            if value is not None and (order := _to_turn(typing.type(value))):
                found[value] = order
    return found


def _to_turn(stream: TensorType) -> Order | None:
    """Return the order that makes a stream [B, N, C] or [B, *sides, C]; None where it is so, or no order does."""
    tokens = [d for d, dim in enumerate(stream) if token_axis(dim) is not None]
    sides = [d for d, dim in enumerate(stream) if all(isinstance(factor, GridAxis) for factor in dim)]
    others = [d for d, dim in enumerate(stream) if is_plain(dim)]
    if len(others) != 2 or (len(tokens), len(sides)) not in ((1, 0), (0, len(stream) - 2)):
        return None
    images = [d for d in others if holds_images(stream[d])] or others[:1]
    features = [d for d in others if d not in images]
    order = (*images, *tokens, *sides, *features)
    return None if len(images) != 1 or not _changes(order) else order


@dataclass
class _Walk:
    """State of the walk.

    graph: the graph that is rewritten.
    shapes: each tensor's shape before the walk.
    turned: for a node that no longer has its own layout, the node to read instead, and the order that gives from it
        what the node held before.
    back: nodes in their own layout again, for readers that need it.
    """

    graph: fx.Graph
    shapes: dict[fx.Node, tuple[int, ...]]
    turned: dict[fx.Node, tuple[fx.Node, Order]] = field(default_factory=dict)
    back: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def begin(self, stream: fx.Node, order: Order) -> None:
        """Turn a stream after it was computed."""
        emit = edit.Emitter(self.graph, like=stream, before=stream.next)
        self.turned[stream] = emit(aten.permute.default, stream, list(order)), _inverse(order)

    def turn(self, node: fx.Node) -> None:
        """Let a node work on turned operands, or give it back the layout that it needs."""
        operands = [operand for operand in node.all_input_nodes if operand in self.turned]
        if not operands:
            return
        order = self.turned[operands[0]][1]
        rule = _RULES.get(node.target)
        if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
            rule = _pointwise
        after = None if rule is None else rule(self, node, order)
        if after is None:
            for operand in operands:
                node.replace_input_with(operand, self.as_before(operand))
        elif node not in self.turned:
            node.meta.pop("val", None)
            self.turned[node] = node, after

    def as_before(self, node: fx.Node) -> fx.Node:
        """Return what `node` held before the walk."""
        if node not in self.turned:
            return node
        if node not in self.back:
            source, order = self.turned[node]
            emit = edit.Emitter(self.graph, like=source, before=source.next)
            self.back[node] = emit(aten.permute.default, source, list(order)) if _changes(order) else source
        return self.back[node]

    def operand(self, node: fx.Node, value: Any, order: Order) -> Any:
        """Return an operand of `node` turned like the others, which `order` turns back; numbers as they are."""
        if not isinstance(value, fx.Node) or value not in self.shapes:
            return value
        if value in self.turned and self.turned[value][1] == order:
            return self.turned[value][0]
        rank = len(self.shapes[value])
        missing = len(order) - rank
        # Where all of its dimensions stay in place, or are of size 1, it fits as it is.
        if all(order[d] == d for d in range(missing, len(order))) or set(self.shapes[value]) <= {1}:
            return self.as_before(value)
        emit = edit.Emitter(self.graph, like=node, before=node)
        value = self.as_before(value)
        for _ in range(missing):
            value = emit(aten.unsqueeze.default, value, 0)
        return emit(aten.permute.default, value, list(_inverse(order)))


def _inverse(order: Sequence[int]) -> Order:
    return tuple(order.index(d) for d in range(len(order)))


def _changes(order: Order) -> bool:
    return order != tuple(range(len(order)))


def _without(order: Order, dims: set[int]) -> Order:
    """Return the order of the dimensions that are left without `dims`, which count the turned ones."""
    left = [d for d in order if d not in dims]
    return tuple(sorted(left).index(d) for d in left)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


# ---- how an operator works on turned operands: each returns the order that turns its result back; None where it can't


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    return node.args


_Rule = Callable[[_Walk, fx.Node, Order], Order | None]


def _pointwise(walk: _Walk, node: fx.Node, order: Order) -> Order | None:
    if node not in walk.shapes or len(walk.shapes[node]) != len(order):
        return None
    node.args = tuple(walk.operand(node, value, order) for value in node.args)
    node.kwargs = {name: walk.operand(node, value, order) for name, value in node.kwargs.items()}
    return order


def _cast_like(walk: _Walk, node: fx.Node, order: Order) -> Order | None:
    x, like, *rest = _arguments(node)
    if x not in walk.turned:
        return None
    source, own = walk.turned[x]
    node.args = (source, walk.turned.get(like, (like, ()))[0], *rest)
    return own


def _over_last(count: Callable[[fx.Node], int]) -> _Rule:
    """Return the rule of an operator on the last dimensions of its first operand alone."""

    def rule(walk: _Walk, node: fx.Node, order: Order) -> Order | None:
        x, *rest = _arguments(node)
        stay = all(order[d] == d for d in range(len(order) - count(node), len(order)))
        if x not in walk.turned or not stay or any(other in walk.turned for other in node.all_input_nodes[1:]):
            return None
        node.args = (walk.turned[x][0], *rest)
        return order

    return rule


def _product(walk: _Walk, node: fx.Node, order: Order) -> Order | None:
    right = _arguments(node)[1]
    if right not in walk.shapes or len(walk.shapes[right]) != 2:
        return None
    return _over_last(lambda _: 1)(walk, node, order)


def _with_dims(position: int, keeps: Callable[[fx.Node], bool]) -> _Rule:
    """Return the rule of an operator of one operand that names dimensions.

    position: of the argument that names them. keeps: whether they are still there in its result.
    """

    def rule(walk: _Walk, node: fx.Node, order: Order) -> Order | None:
        if len(node.args) <= position or node.args[position] is None or node.kwargs.get("dim") is not None:
            return None
        x, named = _arguments(node)[0], _arguments(node)[position]
        if x not in walk.turned:
            return None
        rank = len(order)
        dims = [order[d % rank] for d in ([named] if isinstance(named, int) else named)]
        sizes = walk.shapes[x]
        gone = {d for d in dims if node.target not in SQUEEZES or sizes[_inverse(order)[d]] == 1}
        args = [walk.turned[x][0], *node.args[1:]]
        args[position] = dims[0] if isinstance(named, int) else dims
        node.args = tuple(args)
        return order if keeps(node) else _without(order, gone)

    return rule


def _pointwise_convolution(walk: _Walk, node: fx.Node, order: Order) -> Order | None:
    """Convolutions with a kernel of one over a map whose channels are last, which are linear layers."""
    x, weight, *bias = _arguments(node)
    if x not in walk.turned or not _has_channels_last(order) or not is_pointwise(node):
        return None
    emit = edit.Emitter(walk.graph, like=node, before=node)
    matrix = emit(aten.squeeze.dims, weight, list(range(2, len(order))))
    node.target, node.kwargs = aten.linear.default, {}
    node.args = (walk.turned[x][0], matrix, bias[0] if bias else None)
    return order


def _fixed_norm(walk: _Walk, node: fx.Node, order: Order) -> Order | None:
    """Batch norms with running statistics, over a map whose channels are last: a scale and a shift."""
    x, weight, bias, mean, variance, *rest = _arguments(node)
    if node.target is aten.batch_norm.default:
        training, _, eps, *_ = rest
        if training or mean is None:
            return None
    else:  # which also returns statistics that it saves
        _, eps = rest
        if any(item.args[1] != 0 for item in node.users):
            return None
    if x not in walk.turned or not _has_channels_last(order):
        return None
    emit = edit.Emitter(walk.graph, like=node, before=node)
    scale = emit(aten.rsqrt.default, emit(aten.add.Scalar, variance, eps))
    scale = scale if weight is None else emit(aten.mul.Tensor, scale, weight)
    normed = emit(aten.mul.Tensor, emit(aten.sub.Tensor, walk.turned[x][0], mean), scale)
    node.target, node.kwargs = aten.add.Tensor, {}
    node.args = (normed, 0 if bias is None else bias)
    return order


def _has_channels_last(order: Order) -> bool:
    """Return whether what `order` turns back to [B, C, *sides] lies as [B, *sides, C]."""
    return order == (0, len(order) - 1, *range(1, len(order) - 1))


def _item(walk: _Walk, node: fx.Node, order: Order) -> Order | None:
    listed: Any = node.args[0]
    if listed.target is aten.add.Tensor:  # a norm that was turned: its one result
        walk.turned[node] = walk.turned[listed]
    return walk.turned[listed][1]


def _permutation(walk: _Walk, node: fx.Node, order: Order) -> Order | None:
    composed = tuple(order[d] for d in order_of(node))
    walk.turned[node] = walk.turned[_arguments(node)[0]][0], composed
    return composed


def _unsqueeze(walk: _Walk, node: fx.Node, order: Order) -> Order | None:
    x, position = _arguments(node)
    place = position % (len(order) + 1)
    node.args = (walk.turned[x][0], len(order))
    return (*order[:place], len(order), *order[place:])


def _cat(walk: _Walk, node: fx.Node, order: Order) -> Order | None:
    parts, *dim = _arguments(node)
    if any(len(walk.shapes[part]) != len(order) for part in parts):
        return None
    place = dim[0] if dim else 0
    node.args = ([walk.operand(node, part, order) for part in parts], order[place % len(order)])
    return order


def _view(walk: _Walk, node: fx.Node, order: Order) -> Order | None:
    """Views that regroup only dimensions that stay in place, behind those that don't: features into heads."""
    x = _arguments(node)[0]
    before, after = walk.shapes[x], walk.shapes[node]
    moved = 1 + max(d for d in range(len(order)) if order[d] != d) if _changes(order) else 0
    if before[:moved] != after[:moved]:
        return None
    sizes = written([*(after[place] for place in _inverse(order[:moved])), *after[moved:]])
    if sizes.count(-1) > 1:
        return None
    node.args = (walk.turned[x][0], sizes)
    return (*order[:moved], *range(moved, len(after)))


def _expand(walk: _Walk, node: fx.Node, order: Order) -> Order | None:
    x, sizes, *_ = _arguments(node)
    if len(sizes) != len(order):
        return None
    node.args = (walk.turned[x][0], [sizes[place] for place in _inverse(order)])
    return order


def _keeps(node: fx.Node) -> bool:
    return True


def _drops(node: fx.Node) -> bool:
    return False


def _keepdim(position: int) -> Callable[[fx.Node], bool]:
    return lambda node: bool(
        _arguments(node)[position] if len(node.args) > position else node.kwargs.get("keepdim", False)
    )


_RULES: dict[Any, _Rule] = {
    **dict.fromkeys((*BINARY, *UNARY), _pointwise),
    **dict.fromkeys(CASTS_LIKE, _cast_like),
    **dict.fromkeys(FEATURE_NORMS, _over_last(lambda node: len(node.args[1]))),  # type: ignore[arg-type]
    **dict.fromkeys(MATRIX_PRODUCTS, _product),
    **dict.fromkeys(PERMUTATIONS, _permutation),
    **dict.fromkeys(SOFTMAXES, _with_dims(1, _keeps)),
    **dict.fromkeys(SPLITS, _with_dims(2, _keeps)),
    **dict.fromkeys(SQUEEZES, _with_dims(1, _drops)),
    **dict.fromkeys(VIEWS, _view),
    **dict.fromkeys((aten.mean.dim, aten.amax.default, aten.amin.default), _with_dims(1, _keepdim(2))),
    **dict.fromkeys(CONVOLUTIONS, _pointwise_convolution),
    aten.batch_norm.default: _fixed_norm,
    aten._native_batch_norm_legit_no_training.default: _fixed_norm,
    aten.sum.dim_IntList: _with_dims(1, _keepdim(2)),
    aten.var.correction: _with_dims(1, _keepdim(2)),
    aten.linalg_vector_norm.default: _with_dims(2, _keepdim(3)),
    aten.linear.default: _over_last(lambda _: 1),
    aten.slice.Tensor: _with_dims(1, _keeps),
    aten.select.int: _with_dims(1, _drops),
    aten.unsqueeze.default: _unsqueeze,
    aten.cat.default: _cat,
    aten.expand.default: _expand,
    operator.getitem: _item,
}
