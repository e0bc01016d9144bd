"""How operators work on turned operands, a `Rule` each: the dimensions that they name are others, and so are sizes.

Each rewrites its node and returns the order that turns the result back; None where it can't, and then the operands are
given back as they were.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph.operators import (
    BINARY,
    CASTS_LIKE,
    CONVOLUTIONS,
    FEATURE_NORMS,
    MATRIX_PRODUCTS,
    NAMED_DIMENSIONS,
    PERMUTATIONS,
    SOFTMAXES,
    SPLITS,
    SQUEEZES,
    UNARY,
    VIEWS,
)
from gtp_fx.graph.rearrangements import order_of
from gtp_fx.graph.symbols import written
from gtp_fx.passes.exact.turned_layout import Order, Rule, Walk, arguments, changes, inverse
from gtp_fx.passes.exact.turned_maps import fixed_norm, pointwise_convolution


def _without(order: Order, dims: set[int]) -> Order:
    """Return the order of the dimensions that are left without `dims`, which count the turned ones."""
    left = [d for d in order if d not in dims]
    return tuple(sorted(left).index(d) for d in left)


def _pointwise(walk: Walk, node: fx.Node, order: Order) -> Order | None:
    if node not in walk.shapes or len(walk.shapes[node]) != len(order):
        return None
    node.args = tuple(walk.operand(node, value, order) for value in node.args)
    node.kwargs = {name: walk.operand(node, value, order) for name, value in node.kwargs.items()}
    return order


def _cast_like(walk: Walk, node: fx.Node, order: Order) -> Order | None:
    x, like, *rest = arguments(node)
    if x not in walk.turned:
        return None
    source, own = walk.turned[x]
    node.args = (source, walk.turned.get(like, (like, ()))[0], *rest)
    return own


def _over_last(count: Callable[[fx.Node], int]) -> Rule:
    """Return the rule of an operator on the last dimensions of its first operand alone."""

    def rule(walk: Walk, node: fx.Node, order: Order) -> Order | None:
        x, *rest = arguments(node)
        stay = all(order[d] == d for d in range(len(order) - count(node), len(order)))
        if x not in walk.turned or not stay or any(other in walk.turned for other in node.all_input_nodes[1:]):
            return None
        node.args = (walk.turned[x][0], *rest)
        return order

    return rule


def _product(walk: Walk, node: fx.Node, order: Order) -> Order | None:
    right = arguments(node)[1]
    if right not in walk.shapes or len(walk.shapes[right]) != 2:
        return None
    return _over_last(lambda _: 1)(walk, node, order)


def _with_dims(keeps: Callable[[fx.Node], bool]) -> Rule:
    """Return the rule of an operator of one operand that names dimensions.

    keeps: whether they are still there in its result.
    """

    def rule(walk: Walk, node: fx.Node, order: Order) -> Order | None:
        position = NAMED_DIMENSIONS[node.target]
        if len(node.args) <= position or node.args[position] is None or node.kwargs.get("dim") is not None:
            return None
        x, named = arguments(node)[0], arguments(node)[position]
        if x not in walk.turned:
            return None
        rank = len(order)
        dims = [order[d % rank] for d in ([named] if isinstance(named, int) else named)]
        sizes = walk.shapes[x]
        gone = {d for d in dims if node.target not in SQUEEZES or sizes[inverse(order)[d]] == 1}
        args = [walk.turned[x][0], *node.args[1:]]
        args[position] = dims[0] if isinstance(named, int) else dims
        node.args = tuple(args)
        return order if keeps(node) else _without(order, gone)

    return rule


def _item(walk: Walk, node: fx.Node, order: Order) -> Order | None:
    listed: Any = node.args[0]
    if listed.target is aten.add.Tensor:  # a norm that was turned: its one result
        walk.turned[node] = walk.turned[listed]
    return walk.turned[listed][1]


def _permutation(walk: Walk, node: fx.Node, order: Order) -> Order | None:
    composed = tuple(order[d] for d in order_of(node))
    walk.turned[node] = walk.turned[arguments(node)[0]][0], composed
    return composed


def _unsqueeze(walk: Walk, node: fx.Node, order: Order) -> Order | None:
    x, position = arguments(node)
    place = position % (len(order) + 1)
    node.args = (walk.turned[x][0], len(order))
    return (*order[:place], len(order), *order[place:])


def _cat(walk: Walk, node: fx.Node, order: Order) -> Order | None:
    parts, *dim = arguments(node)
    if any(len(walk.shapes[part]) != len(order) for part in parts):
        return None
    place = dim[0] if dim else 0
    node.args = ([walk.operand(node, part, order) for part in parts], order[place % len(order)])
    return order


def _stack(walk: Walk, node: fx.Node, order: Order) -> Order | None:
    """Stack along a new last dimension; `order` puts it where it was."""
    parts, *dim = arguments(node)
    asked: Any = dim[0] if dim else node.kwargs.get("dim", 0)
    place = asked % (len(order) + 1)
    node.args, node.kwargs = ([walk.operand(node, part, order) for part in parts], len(order)), {}
    return (*order[:place], len(order), *order[place:])


def _view(walk: Walk, node: fx.Node, order: Order) -> Order | None:
    """Views that regroup only dimensions that stay in place, behind those that don't: features into heads."""
    x = arguments(node)[0]
    before, after = walk.shapes[x], walk.shapes[node]
    moved = 1 + max(d for d in range(len(order)) if order[d] != d) if changes(order) else 0
    if before[:moved] != after[:moved]:
        return None
    sizes = written([*(after[place] for place in inverse(order[:moved])), *after[moved:]])
    if sizes.count(-1) > 1:
        return None
    node.args = (walk.turned[x][0], sizes)
    return (*order[:moved], *range(moved, len(after)))


def _expand(walk: Walk, node: fx.Node, order: Order) -> Order | None:
    x, sizes, *_ = arguments(node)
    if len(sizes) != len(order):
        return None
    node.args = (walk.turned[x][0], [sizes[place] for place in inverse(order)])
    return order


def _keeps(node: fx.Node) -> bool:
    return True


def _drops(node: fx.Node) -> bool:
    return False


def _keepdim(position: int) -> Callable[[fx.Node], bool]:
    return lambda node: bool(
        arguments(node)[position] if len(node.args) > position else node.kwargs.get("keepdim", False)
    )


_RULES: dict[Any, Rule] = {
    **dict.fromkeys((*BINARY, *UNARY), _pointwise),
    **dict.fromkeys(CASTS_LIKE, _cast_like),
    **dict.fromkeys(FEATURE_NORMS, _over_last(lambda node: len(node.args[1]))),  # type: ignore[arg-type]
    **dict.fromkeys(MATRIX_PRODUCTS, _product),
    **dict.fromkeys(PERMUTATIONS, _permutation),
    **dict.fromkeys(SOFTMAXES, _with_dims(_keeps)),
    **dict.fromkeys(SPLITS, _with_dims(_keeps)),
    **dict.fromkeys(SQUEEZES, _with_dims(_drops)),
    **dict.fromkeys(VIEWS, _view),
    **dict.fromkeys((aten.mean.dim, aten.amax.default, aten.amin.default), _with_dims(_keepdim(2))),
    **dict.fromkeys(CONVOLUTIONS, pointwise_convolution),
    aten.batch_norm.default: fixed_norm,
    aten._native_batch_norm_legit_no_training.default: fixed_norm,
    aten.sum.dim_IntList: _with_dims(_keepdim(2)),
    aten.var.correction: _with_dims(_keepdim(2)),
    aten.linalg_vector_norm.default: _with_dims(_keepdim(3)),
    aten.linear.default: _over_last(lambda _: 1),
    aten.slice.Tensor: _with_dims(_keeps),
    aten.select.int: _with_dims(_drops),
    aten.unsqueeze.default: _unsqueeze,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.expand.default: _expand,
    operator.getitem: _item,
}


def rule_of(node: fx.Node) -> Rule | None:
    """Return how a node's operator works on turned operands; None where it can't."""
    rule = _RULES.get(node.target)
    if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _pointwise
    return rule
