"""Exact: remove operators that change nothing, and spell the others in one way for every later pass.

What changes nothing are asserts about metadata, dropouts that are off, copies, casts to the type that a tensor has, and
slices that take everything. Views become reshapes, which don't depend on the strides of their input, so that a later
pass may replace the node that computes it. Casts name their type alone, and no other tensor that has it. Items of
splits and unbinds become slices and selects, a scale comes second, a sum over a stack is one, and so is a row of what a
stack holds. What is added up twice is one sum. What is rearranged and then arranged as it was is the value itself: so
are the views through which a part of the model writes in place, once the graph is functional.
"""

from __future__ import annotations

import itertools
import operator
import sys
from typing import Any

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph import edit
from gtp_fx.graph.operators import BINARY, CASTS, CASTS_LIKE, FLATTENINGS, SPLITS, UNARY, VIEWS, VIEWS_LIKE
from gtp_fx.graph.symbols import is_symbolic, shape_of, written
from gtp_fx.passes.exact.unchanged import changes_nothing, first_operand, overwrites, undone

_ASSERTS = (aten._assert_tensor_metadata.default,)


def normalise(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of `gm` without operators that change nothing."""
    gm = edit.copy_of(gm)
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in (*CASTS, *CASTS_LIKE):
            _as_cast(node)
        if node.target in _ASSERTS:
            gm.graph.erase_node(node)
        elif node.target is operator.getitem:
            _take_by_place(gm.graph, node)
        elif overwrites(node):
            edit.replace(node, node.args[1])
        elif changes_nothing(node):
            edit.replace(node, node.all_input_nodes[0])
        elif (before := undone(node)) is not None:
            edit.replace(node, before)
        elif node.target in VIEWS:
            node.target = aten.reshape.default
        elif node.target in (*FLATTENINGS, *VIEWS_LIKE):
            _as_reshape(node)
        elif node.target is aten.mul.Tensor and _scales_from_the_left(node):
            node.args = (node.args[1], node.args[0])
        elif node.target is aten.stack.default and _is_merged_again(node):
            _end_to_end(gm.graph, node)
        elif node.target is aten.sum.dim_IntList and (summands := _summands(node)):
            _as_additions(gm.graph, node, summands)
    _add_once(gm.graph)
    return edit.finish(gm)


def _add_once(graph: fx.Graph) -> None:
    """Let what is added up twice be one sum: where all branches are kept in a list, each sum goes on from the last."""
    sums: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is not aten.add.Tensor or not all(isinstance(x, fx.Node) for x in node.args):
            continue
        same = sums.setdefault((node.args, tuple(node.kwargs.items())), node)
        if same is not node:
            edit.replace(node, same)


def _as_reshape(node: fx.Node) -> None:
    """Turn a flatten, an unflatten or a view as another tensor into a reshape, where at most one size is symbolic.

    torch.export keeps these operators; Dynamo's graph has views in their place.
    """
    sizes = written(shape_of(node))
    if sizes.count(-1) <= 1:
        value = node.meta["val"]
        node.target, node.kwargs = aten.reshape.default, {}
        edit.set_args(node, (node.args[0], sizes))
        node.meta["val"] = value  # said in other words


def _as_cast(node: fx.Node) -> None:
    """Spell a cast, whatever it takes the type from, as `to` with a type; one to another device stays as it is."""
    before, after = first_operand(node).meta["val"], node.meta["val"]
    if before.device != after.device or before.layout != after.layout:
        return
    node.target, node.args, node.kwargs = aten.to.dtype, (node.args[0], after.dtype), {}


def _take_by_place(graph: fx.Graph, item: fx.Node) -> None:
    """Turn an item of an unbind into a select, and one of a split or chunk into a slice, where sizes are known.

    A reader of one part then doesn't hang on what others read.
    """
    whole, number = first_operand(item), item.args[1]
    if whole.target not in (*SPLITS, aten.unbind.int) or not isinstance(number, int):
        return
    x, values = first_operand(whole), whole.meta["val"]
    position = 1 if whole.target is aten.unbind.int else 2
    place: Any = whole.args[position] if len(whole.args) > position else whole.kwargs.get("dim", 0)
    dim = place % len(shape_of(x))
    emit = edit.Emitter(graph, like=item, before=item)
    if whole.target is aten.unbind.int:
        taken = emit(aten.select.int, x, dim, number % len(values))
    else:
        ends = list(itertools.accumulate(value.shape[dim] for value in values))
        if any(map(is_symbolic, ends)):
            return
        number %= len(values)
        stop = sys.maxsize if ends[number] == shape_of(x)[dim] else ends[number]
        taken = emit(aten.slice.Tensor, x, dim, ends[number] - values[number].shape[dim], stop)
    edit.replace(item, taken)


def _scales_from_the_left(node: fx.Node) -> bool:
    """Tell whether a product has its smaller tensor, or its number, first: a scale comes second."""
    first, second = node.args
    if not isinstance(second, fx.Node):
        return False
    return not isinstance(first, fx.Node) or len(shape_of(first)) < len(shape_of(second))


def _summands(node: fx.Node) -> list[fx.Node]:
    """Return the tensors that are stacked and then summed again over the new dimension; none where it isn't so."""
    stack = first_operand(node)
    if stack.target is not aten.stack.default or len(stack.users) != 1 or len(node.args) != 2 or node.kwargs:
        return []
    dims: Any = node.args[1]
    tensors: Any = stack.args[0]
    rank = len(shape_of(stack))
    return list(tensors) if [dim % rank for dim in dims] == [_place(stack)] else []


def _as_additions(graph: fx.Graph, node: fx.Node, summands: list[fx.Node]) -> None:
    """Turn a sum over stacked tensors into additions, which a residual stream can be seen in."""
    emit = edit.Emitter(graph, like=node, before=node)
    total = summands[0]
    for summand in summands[1:]:
        total = emit(aten.add.Tensor, total, summand)
    stack = first_operand(node)
    edit.replace(node, total)
    graph.erase_node(stack)


def _is_merged_again(stack: fx.Node) -> bool:
    """Tell whether the new dimension of a stack is merged with the next one, after nothing but element-wise work."""
    shape, place = shape_of(stack), _place(stack)
    if place + 2 > len(shape) or is_symbolic(shape[place + 1]):
        return False
    merged = (*shape[:place], shape[place] * shape[place + 1], *shape[place + 2 :])
    reader = stack
    while len(reader.users) == 1:
        (reader,) = reader.users
        if reader.target in (*VIEWS, *FLATTENINGS):
            return shape_of(reader) == merged
        if reader.target not in (*BINARY, *UNARY) or shape_of(reader) != shape:
            return False
    return False


def _end_to_end(graph: fx.Graph, stack: fx.Node) -> None:
    """Turn a stack into tensors end to end, seen with a dimension for which of them it is.

    Tokens of several grids then are one row of tokens from the beginning, as they are afterwards.
    """
    emit = edit.Emitter(graph, like=stack, before=stack)
    row = emit(aten.cat.default, stack.args[0], _place(stack))
    row.meta["val"] = stack.meta["val"].flatten(_place(stack), _place(stack) + 1)  # what follows asks for its shape
    apart = emit(aten.reshape.default, row, written(shape_of(stack)))
    edit.replace(stack, apart)


def _place(stack: fx.Node) -> int:
    """Return which dimension of its result a stack adds."""
    place: Any = stack.args[1] if len(stack.args) > 1 else stack.kwargs.get("dim", 0)
    return int(place) % len(shape_of(stack))
