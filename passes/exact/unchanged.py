"""Which nodes hold what another one holds already."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph import nodes
from gtp_fx.graph.operators import COPIES, PERMUTATIONS, SCALINGS, SQUEEZES, VIEWS
from gtp_fx.graph.rearrangements import leaves_as_it_was, order_of
from gtp_fx.graph.symbols import shape_of

_CHAINED = (*VIEWS, *PERMUTATIONS)


def overwrites(node: fx.Node) -> bool:
    """Tell whether a call writes its second argument over all of its first: what is left of `x[:, :] = y`."""
    if node.target not in (aten.copy.default, aten.slice_scatter.default):
        return False
    written, value = node.args[1], node.meta["val"]
    if not isinstance(written, fx.Node) or nodes.is_input(written):
        return False
    source = written.meta["val"]
    return source.dtype == value.dtype and tuple(source.shape) == tuple(value.shape)


def changes_nothing(node: fx.Node) -> bool:
    """Tell whether a call returns its first argument unchanged."""
    if node.target is aten.dropout.default:
        _, probability, training = node.args
        return not training or probability in (0, 0.0)
    if node.target in (aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar):
        of_number = isinstance(node.args[0], fx.Node) and isinstance(node.args[1], int | float)
        return bool(of_number and node.args[1] == 0 and first_operand(node).meta["val"].dtype == node.meta["val"].dtype)
    if node.target in SCALINGS and isinstance(node.args[1], int | float):
        return node.args[1] == 1 and not node.kwargs and first_operand(node).meta["val"].dtype == node.meta["val"].dtype
    if node.target in PERMUTATIONS:
        return order_of(node) == tuple(range(len(shape_of(node))))
    if node.target is aten.slice.Tensor:
        return _same_shape(node) and node.args[4:] in ((), (1,))
    if node.target in (*VIEWS, *SQUEEZES, aten.expand.default):
        return _same_shape(node)
    if node.target is aten.cat.default:
        parts: Any = node.args[0]
        return len(parts) == 1 and not nodes.is_input(parts[0])
    # The graph is functional, so a copy of a value that it computed is as good as the value. A copy of an argument
    # isn't: the graph may return it, and the caller may write to it.
    copies = node.target in COPIES or (
        node.target is aten.to.dtype and first_operand(node).meta["val"].dtype == node.args[1]
    )
    return copies and not nodes.is_input(first_operand(node))


def undone(node: fx.Node) -> fx.Node | None:
    """Return the value that a chain of views and permutations which ends in `node` leaves as it was, or None."""
    if node.target not in _CHAINED:
        return None
    chain = [node]
    while (before := first_operand(chain[0])).target in _CHAINED:
        chain.insert(0, before)
        if leaves_as_it_was(chain):
            return first_operand(before)
    return None


def _same_shape(node: fx.Node) -> bool:
    """Tell whether a node has the shape of its first argument."""
    return tuple(node.meta["val"].shape) == tuple(first_operand(node).meta["val"].shape)


def first_operand(node: fx.Node) -> fx.Node:
    """Return a node's first argument."""
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    return operand
