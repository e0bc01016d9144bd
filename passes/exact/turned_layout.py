"""The walk that lets operators work in another layout: which values are turned, and how each is had back as it was.

x ─ op ─ y      ->      permute(x) ─ op in the other layout ─ y turned ─ (permute back, for a reader that can't)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph import edit

Order = tuple[int, ...]
"""A permutation of dimensions, as aten.permute takes it."""


@dataclass
class Walk:
    """State of the walk.

    graph: the graph that is rewritten.
    shapes: each tensor's shape before the walk.
    rule_of: how a node's operator works on turned operands; None where it can't.
    stays_whole: whether a node is a layer's call that no rule may replace by another operator.
    turned: for a node that no longer has its own layout, the node to read instead, and the order that gives from it
        what the node held before.
    back: nodes in their own layout again, for readers that need it.
    """

    graph: fx.Graph
    shapes: dict[fx.Node, tuple[int, ...]]
    rule_of: Callable[[fx.Node], Rule | None]
    stays_whole: Callable[[fx.Node], bool]
    turned: dict[fx.Node, tuple[fx.Node, Order]] = field(default_factory=dict)
    back: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def begin(self, stream: fx.Node, order: Order) -> None:
        """Turn a stream after it was computed; readers that need it as it was still read that."""
        emit = edit.Emitter(self.graph, like=stream, before=stream.next)
        self.turned[stream] = emit(aten.permute.default, stream, list(order)), inverse(order)
        self.back[stream] = stream

    def turn(self, node: fx.Node) -> None:
        """Let a node work on turned operands, or give it back the layout that it needs."""
        operands = [operand for operand in node.all_input_nodes if operand in self.turned]
        if not operands:
            return
        order = self.turned[operands[0]][1]
        rule = self.rule_of(node)
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
            self.back[node] = emit(aten.permute.default, source, list(order)) if changes(order) else source
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
        return emit(aten.permute.default, value, list(inverse(order)))


Rule = Callable[[Walk, fx.Node, Order], Order | None]
"""How an operator works on turned operands: rewrites the node, and returns the order that turns its result back."""


def inverse(order: Sequence[int]) -> Order:
    """Return the order that undoes another."""
    return tuple(order.index(d) for d in range(len(order)))


def changes(order: Order) -> bool:
    """Return whether an order moves any dimension."""
    return order != tuple(range(len(order)))


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """Return a node's positional arguments, which a rule knows by their places."""
    return node.args
