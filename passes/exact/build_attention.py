"""Build `aten.scaled_dot_product_attention` from logits that were read.

The scale is the operator's own, factors go to the queries, and all addends and masks become its one additive mask.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph.edit import Emitter
from gtp_fx.graph.symbols import divided, is_symbolic, per_image, shape_of, written
from gtp_fx.passes.exact.read_logits import Addend, Logits, Mask

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Sized:
    """A value that isn't verified yet, with its shape."""

    node: fx.Node
    shape: Shape


@dataclass(frozen=True)
class Operands:
    """What the operator reads, with the leading dimensions of q·kᵀ.

    query, key: [..., tokens, features].
    mask: additive, broadcasts to [..., queries, keys].
    """

    query: Sized
    key: Sized
    mask: Sized | None


def build_operands(emit: Emitter, logits: Logits, known: Mapping[Any, Tensor]) -> Operands:
    """Insert queries, keys and the additive mask.

    known: values that depend on no input, for one image. A row whose entries are all hidden is uniform where they are
    filled with a number, and undefined where they are -inf. Where `known` doesn't tell that there is no such row, its
    query becomes 0 or NaN.
    """
    query = logits.q
    for factor in logits.factors:
        query = emit(aten.div.Tensor if factor.divides else aten.mul.Tensor, query, factor.value)
    hidden = [_hidden(emit, mask, logits) for mask in logits.masks]
    if hidden and not _leaves_every_row(logits, known):
        union = hidden[0].node
        for other in hidden[1:]:
            union = emit(aten.logical_or.default, union, other.node)
        fill = 0.0 if math.isfinite(logits.masks[0].fill) else math.nan
        query = emit(aten.masked_fill.Scalar, query, emit(aten.all.dim, union, -1, True), fill)
    key_shape = shape_of(logits.k_transposed)
    key = Sized(_transposed(emit, logits.k_transposed), (*key_shape[:-2], key_shape[-1], key_shape[-2]))
    return Operands(Sized(query, shape_of(logits.q)), key, _additive(emit, logits, hidden))


def can_be_built(logits: Logits, known: Mapping[Any, Tensor]) -> bool:
    """Return whether rows whose entries may all be hidden come out as they were."""
    if not logits.masks or _leaves_every_row(logits, known):
        return True
    fills = {mask.fill for mask in logits.masks}
    return len(fills) == 1 and (logits.masked_last or fills == {-math.inf})


def _leaves_every_row(logits: Logits, known: Mapping[Any, Tensor]) -> bool:
    """Return whether it is known that the masks hide no row of the logits wholly."""
    product = [per_image(size) for size in shape_of(logits.product)]
    hidden = torch.zeros((), dtype=torch.bool)
    for mask in logits.masks:
        value = known.get(mask.value)
        if value is None:
            return False
        one = ~value if mask.shows else value
        if mask.shape != shape_of(logits.product):
            one = one.expand([per_image(size) for size in mask.shape]).reshape(product)
        hidden = hidden | one
    return not bool(hidden.expand(*hidden.shape[:-1], product[-1]).all(-1).any())


def _transposed(emit: Emitter, node: fx.Node) -> fx.Node:
    """Transpose the last two dimensions of `node`, or undo its transpose."""
    rank = len(shape_of(node))
    if node.target is aten.transpose.int and {d % rank for d in node.args[1:]} == {rank - 2, rank - 1}:  # type: ignore[operator]
        return node.args[0]  # type: ignore[return-value]
    return emit(aten.transpose.int, node, -2, -1)


def _hidden(emit: Emitter, mask: Mask, logits: Logits) -> Sized:
    """Return a mask that is True where entries are hidden, in the dimensions of q·kᵀ."""
    value = emit(aten.logical_not.default, mask.value) if mask.shows else mask.value
    return seen_as(emit, Sized(value, shape_of(mask.value)), mask.shape, shape_of(logits.product), logits.q)


def _additive(emit: Emitter, logits: Logits, hidden: Sequence[Sized]) -> Sized | None:
    """Return the sum of all addends, with the fill where entries are hidden; None where there are neither."""
    dtype = logits.q.meta["val"].dtype
    total: Sized | None = None
    # What is added in one shape is added up in it, so that it is copied once.
    for shape in dict.fromkeys(addend.shape for addend in logits.addends):
        part = _sum(emit, [addend for addend in logits.addends if addend.shape == shape])
        part = seen_as(emit, part, shape, shape_of(logits.product), logits.q)
        total = part if total is None else _added(emit, total, part)
    if total is not None and any(addend.value.meta["val"].dtype != dtype for addend in logits.addends):
        total = replace(total, node=emit(aten.to.dtype, total.node, dtype))
    for mask, where in zip(logits.masks, hidden, strict=True):
        fill = mask.fill if mask.fill == -math.inf else max(mask.fill, torch.finfo(dtype).min)
        # A mask that stands alone is 1 where it hides, which is filled, and 0 elsewhere.
        before = Sized(emit(aten.to.dtype, where.node, dtype), where.shape) if total is None else total
        filled = emit(aten.masked_fill.Scalar, before.node, where.node, fill)
        total = Sized(filled, broadcast(before.shape, where.shape))
    return total


def _sum(emit: Emitter, addends: Sequence[Addend]) -> Sized:
    """Insert the sum of addends that belong to one shape."""
    parts = []
    for addend in addends:
        one = addend.value
        if addend.times != 1.0:
            one = emit(aten.mul.Tensor, one, addend.times)
        for factor in addend.factors:
            one = emit(aten.div.Tensor if factor.divides else aten.mul.Tensor, one, factor.value)
        parts.append(Sized(one, broadcast(shape_of(addend.value), *(shape_of(f.value) for f in addend.factors))))
    return functools.reduce(functools.partial(_added, emit), parts)


def _added(emit: Emitter, first: Sized, second: Sized) -> Sized:
    return Sized(emit(aten.add.Tensor, first.node, second.node), broadcast(first.shape, second.shape))


def broadcast(*shapes: Shape) -> Shape:
    """Return the shape of tensors that are broadcast together."""
    return tuple(torch.broadcast_shapes(*shapes))


def seen_as(emit: Emitter, value: Sized, shape: Shape, goal: Shape, like: fx.Node) -> Sized:
    """Reshape what broadcasts to `shape` to what broadcasts to `goal`, which holds the same entries in the same order.

    It is expanded within those runs of dimensions alone that the two shapes cut in other ways.

    like: a tensor of whose sizes those that are known only when the graph runs are multiples or parts.
    """
    if shape == goal:
        return value
    sizes = (1,) * (len(shape) - len(value.shape)) + value.shape
    expanded, target = list(sizes), []
    for own, theirs in _runs(shape, goal):
        if all(sizes[dim] == 1 for dim in own):
            target += [1] * len(theirs)
        else:
            expanded[own.start : own.stop] = shape[own.start : own.stop]
            target += goal[theirs.start : theirs.stop]
    node = value.node
    if tuple(expanded) != sizes:
        named = [-1 if new == old else _size(emit, new, like) for new, old in zip(expanded, sizes, strict=True)]
        node = emit(aten.expand.default, node, named)
    return Sized(emit(aten.reshape.default, node, written(target)), tuple(target))


def spread(emit: Emitter, value: Sized, lead: Shape, like: fx.Node) -> Sized:
    """Expand [..., tokens, features] to the leading dimensions `lead`, as keys are that all heads share."""
    goal = (*lead, *value.shape[-2:])
    if value.shape == goal:
        return value
    own = (1,) * (len(goal) - len(value.shape)) + value.shape
    sizes = [-1 if new == old else _size(emit, new, like) for new, old in zip(goal, own, strict=True)]
    return Sized(emit(aten.expand.default, value.node, sizes), goal)


def _runs(first: Shape, second: Shape) -> list[tuple[range, range]]:
    """Return the shortest runs of dimensions that hold the same entries in both shapes, outermost first."""
    runs, i, j = [], 0, 0
    while i < len(first) and j < len(second):
        start, left, right = (i, j), first[i], second[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * first[i], i + 1
            else:
                right, j = right * second[j], j + 1
        runs.append((range(start[0], i), range(start[1], j)))
    # Dimensions of one entry may be left at the end of either.
    if runs and (i < len(first) or j < len(second)):
        own, theirs = runs[-1]
        runs[-1] = (range(own.start, len(first)), range(theirs.start, len(second)))
    return runs


def _size(emit: Emitter, size: int, like: fx.Node) -> Any:
    """Return a size as an argument: a number, or part of one of `like`'s where it is known only at run time."""
    if not is_symbolic(size):
        return size
    for dim, whole in enumerate(shape_of(like)):
        parts = divided(whole, size) if is_symbolic(whole) else None
        if parts is not None and not is_symbolic(parts):
            entries = emit(aten.sym_size.int, like, dim)
            return entries if parts == 1 else emit(operator.floordiv, entries, parts)
    raise AssertionError(f"no dimension of {like} is a multiple of {size}")
