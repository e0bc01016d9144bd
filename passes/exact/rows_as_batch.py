"""Rows of tokens without a batch, [N, C], as a batch of one, [1, N, C], as blocks are found in.

A tower that packs images into one sequence has no dimension for images: its stream is [N, C], and attention adds one
where it needs it. From the one value through which everything passes before the first attention, every operator that
can works on [1, …] in its place; a reader that can't gets what it read before. No number changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph import edit
from gtp_fx.graph.nodes import descendants
from gtp_fx.graph.operators import (
    ATTENTION,
    BINARY,
    CASTS,
    COPIES,
    FEATURE_NORMS,
    FLATTENINGS,
    MATRIX_PRODUCTS,
    NAMED_DIMENSIONS,
    PERMUTATIONS,
    SOFTMAXES,
    UNARY,
    VIEWS,
)
from gtp_fx.graph.rearrangements import order_of
from gtp_fx.graph.symbols import is_symbolic, shape_of

ROWS = "gtp_rows"
"""Meta key of a value [1, N, C] that was rows [N, C] in the model."""


def rows_as_batch(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of `gm` whose rows are a batch of one, their first value marked; `gm` where there are none."""
    new = edit.copy_of(gm)
    rows = _rows(new.graph)
    if rows is None:
        return gm
    later = list(new.graph.nodes)
    walk = _Walk(new.graph)
    walk.begin(rows)
    for node in later[later.index(rows) + 1 :]:
        walk.step(node)
    return edit.finish(new)


def _rows(graph: fx.Graph) -> fx.Node | None:
    """Return the last value before any attention through which all that depends on the inputs passes; None without one.

    It has to be [N, C] of a number of tokens that doesn't vary.
    """
    inputs = [node for node in graph.find_nodes(op="placeholder") if node.users]
    dependent = set(inputs).union(*map(descendants, inputs))
    alive: set[fx.Node] = set()
    found: fx.Node | None = None
    pending = {node: len(node.users) for node in dependent}
    for node in graph.nodes:
        if node.target in (*ATTENTION, *SOFTMAXES) or node.op == "output":
            break
        if node not in dependent:
            continue
        for operand in node.all_input_nodes:
            if operand in alive:
                pending[operand] -= 1
                if not pending[operand]:
                    alive.discard(operand)
        alive.add(node)
        if alive == {node} and _is_row(node):
            found = node
    return found


def _is_row(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.ndim != 2 or not value.is_floating_point():
        return False
    return value.shape[0] > 1 and not is_symbolic(value.shape[0])


@dataclass
class _Walk:
    """State of the walk.

    batched: for a value, the node that holds it as a batch of one, in a dimension before its own.
    own: values whose first dimension is that of the batch, as the model has them.
    """

    graph: fx.Graph
    batched: dict[fx.Node, fx.Node] = field(default_factory=dict)
    own: set[fx.Node] = field(default_factory=set)

    def begin(self, rows: fx.Node) -> None:
        with self.graph.inserting_after(rows):
            first = self.graph.create_node("call_function", aten.unsqueeze.default, (rows, 0), name="packed_tokens")
        first.meta = {key: rows.meta[key] for key in edit.META_KEYS if key in rows.meta}
        first.meta |= {"val": rows.meta["val"].unsqueeze(0), ROWS: True}
        self.batched[rows] = first

    def step(self, node: fx.Node) -> None:
        """Let a node work on a batch of one, or give it back what it read before."""
        operands = [operand for operand in node.all_input_nodes if operand in self.batched]
        if not operands:
            if any(operand in self.own for operand in node.all_input_nodes):
                self._follow(node)
            return
        emit = edit.Emitter(self.graph, like=node, before=node)
        rule = _rule_of(node)
        result = None if rule is None else rule(self, node, emit)
        if result is not None:
            self.batched[node] = result
            return
        if node.target is aten.unsqueeze.default and node.args[1] % (len(shape_of(operands[0])) + 1) == 0:  # type: ignore[operator]
            inside = self.batched[operands[0]]  # which is the same
            node.replace_all_uses_with(inside)
            self.own.add(inside)
            return
        for operand in operands:
            node.replace_input_with(operand, emit(aten.squeeze.dim, self.batched[operand], 0))

    def _follow(self, node: fx.Node) -> None:
        """Note what becomes of a value that has the batch as its first dimension."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not value.ndim:
            return
        if value.shape[0] == 1:
            self.own.add(node)
        elif node.target in VIEWS:  # [1, N, H, D] as [N, C]
            emit = edit.Emitter(self.graph, like=node, before=node)
            self.batched[node] = emit(aten.reshape.default, node.args[0], [1, *value.shape])

    def of(self, value: Any) -> Any:
        """Return a value as a batch of one, where it is one; anything else as it is."""
        return self.batched.get(value, value) if isinstance(value, fx.Node) else value


_Rule = Callable[[_Walk, fx.Node, edit.Emitter], "fx.Node | None"]
"""Emits the call that a node becomes on batches of one; None where it can't."""


def _pointwise(walk: _Walk, node: fx.Node, emit: edit.Emitter) -> fx.Node | None:
    if node.kwargs:
        return None
    rank = len(shape_of(node))

    def operand(value: Any) -> Any:
        if not isinstance(value, fx.Node) or value not in walk.batched:
            return value
        shape = shape_of(value)
        missing = rank - len(shape)
        return emit(aten.reshape.default, walk.of(value), [1] * (1 + missing) + [*shape]) if missing else walk.of(value)

    return emit(node.target, *map(operand, node.args))


def _over_last(walk: _Walk, node: fx.Node, emit: edit.Emitter) -> fx.Node | None:
    """Operators on the last dimensions of their first operand alone."""
    x, *rest = node.args
    if x not in walk.batched or any(other in walk.batched for other in node.all_input_nodes if other is not x):
        return None
    if node.kwargs or (node.target in MATRIX_PRODUCTS and len(shape_of(rest[0])) != 2):  # type: ignore[arg-type]
        return None
    return emit(aten.matmul.default if node.target in MATRIX_PRODUCTS else node.target, walk.of(x), *rest)


def _with_dims(walk: _Walk, node: fx.Node, emit: edit.Emitter) -> fx.Node | None:
    """Operators of one operand that name dimensions."""
    position = NAMED_DIMENSIONS[node.target]
    if node.kwargs or len(node.args) <= position or node.args[0] not in walk.batched:
        return None
    args: list[Any] = [walk.of(node.args[0]), *node.args[1:]]
    named = args[position]
    args[position] = _later(named) if isinstance(named, int) else [_later(dim) for dim in named or ()]
    return emit(node.target, *args) if args[position] != [] else None


def _later(dim: int) -> int:
    return dim if dim < 0 else dim + 1


def _permutation(walk: _Walk, node: fx.Node, emit: edit.Emitter) -> fx.Node | None:
    return emit(aten.permute.default, walk.of(node.args[0]), [0, *(dim + 1 for dim in order_of(node))])


def _unsqueeze(walk: _Walk, node: fx.Node, emit: edit.Emitter) -> fx.Node | None:
    x, place = node.args
    dim = place % (len(shape_of(x)) + 1)  # type: ignore[operator, arg-type]
    return emit(aten.unsqueeze.default, walk.of(x), dim + 1) if dim else None


def _view(walk: _Walk, node: fx.Node, emit: edit.Emitter) -> fx.Node | None:
    return emit(aten.reshape.default, walk.of(node.args[0]), [1, *shape_of(node)])


def _cat(walk: _Walk, node: fx.Node, emit: edit.Emitter) -> fx.Node | None:
    parts: Any
    parts, *dim = node.args
    if node.kwargs:
        return None
    own = [walk.of(part) if part in walk.batched else emit(aten.unsqueeze.default, part, 0) for part in parts]
    place: Any = dim[0] if dim else 0
    return emit(node.target, own, _later(place))


def _pick(walk: _Walk, node: fx.Node, emit: edit.Emitter) -> fx.Node | None:
    """Picks along one dimension by numbers that don't depend on the images."""
    x, numbers = node.args
    picked = [number for number in numbers if number is not None]  # type: ignore[union-attr]
    if x not in walk.batched or len(picked) != 1 or picked[0] in walk.batched:
        return None
    return emit(aten.index.Tensor, walk.of(x), [None, *numbers])  # type: ignore[misc]


_RULES: dict[Any, _Rule] = {
    **dict.fromkeys((*BINARY, *UNARY, *COPIES, *CASTS), _pointwise),
    **dict.fromkeys(NAMED_DIMENSIONS, _with_dims),
    **dict.fromkeys((*FEATURE_NORMS, *MATRIX_PRODUCTS, aten.linear.default), _over_last),
    **dict.fromkeys(PERMUTATIONS, _permutation),
    **dict.fromkeys((*VIEWS, *FLATTENINGS), _view),
    **dict.fromkeys((aten.cat.default, aten.stack.default), _cat),
    aten.unsqueeze.default: _unsqueeze,
    aten.index.Tensor: _pick,
}


def _rule_of(node: fx.Node) -> _Rule | None:
    """Return how a node works on batches of one; None where it can't, or where its result is no single tensor."""
    if not isinstance(node.meta.get("val"), Tensor):
        return None
    rule = _RULES.get(node.target)
    if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _pointwise
    return rule
