"""Chains of views and permutations, as what each dimension of their result is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph.operators import PERMUTATIONS, REARRANGED, VIEWS
from gtp_fx.graph.symbols import divided, shape_of

REARRANGING = (*VIEWS, *PERMUTATIONS, *REARRANGED, aten.unfold.default)
"""Operators that `rearranged` follows."""


@dataclass(frozen=True)
class Part:
    """A dimension of a value, or a part of one: `size` places, `stride` apart."""

    dim: int
    size: int
    stride: int


Parts = list[list[Part]]
"""The parts that each dimension of a rearranged value is made of, outermost first; none in a dimension of size 1."""


def chain_before(node: fx.Node) -> list[fx.Node]:
    """Return the rearranging operators right before `node`, and `node` itself, the first one first."""
    chain = [node]
    before: Any = node.args[0]
    while isinstance(before, fx.Node) and before.target in REARRANGING:
        chain.insert(0, before)
        before = before.args[0]
    return chain


def order_of(node: fx.Node) -> tuple[int, ...]:
    """Return the operand's dimension that each dimension of a permutation's or transposition's result is."""
    rank = len(shape_of(node))
    given: tuple[Any, ...] = node.args[1:]
    if node.target is aten.permute.default:
        return tuple(dim % rank for dim in given[0])
    order, (a, b) = list(range(rank)), (dim % rank for dim in given)
    order[a], order[b] = order[b], order[a]
    return tuple(order)


def whole_parts(shape: tuple[int, ...]) -> Parts:
    """Return the parts of a value that isn't rearranged."""
    return [[Part(dim, size, 1)] if size != 1 else [] for dim, size in enumerate(shape)]


def rearranged(parts: Parts, node: fx.Node) -> Parts | None:
    """Return the parts of a rearranging operator's result; None where they can't be told."""
    arguments: tuple[Any, ...] = node.args
    if node.target in VIEWS:
        return _regrouped(parts, shape_of(node))
    if node.target in PERMUTATIONS:
        return [parts[dim] for dim in order_of(node)]
    if node.target is aten.unfold.default:
        return _cut(parts, *arguments[1:])
    return parts


def leaves_as_it_was(chain: Sequence[fx.Node]) -> bool:
    """Return whether a chain of rearranging operators returns its first one's operand, each entry in its place."""
    shape = shape_of(chain[0].all_input_nodes[0])
    parts: Parts | None = whole_parts(shape)
    for node in chain:
        parts = None if parts is None else rearranged(parts, node)
    return parts is not None and shape_of(chain[-1]) == shape and [_joined(dim) for dim in parts] == whole_parts(shape)


def _joined(parts: list[Part]) -> list[Part]:
    """Return parts with those joined that follow each other in one dimension."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if last is not None and last.dim == part.dim and last.stride == part.stride * part.size:
            joined[-1] = Part(part.dim, last.size * part.size, part.stride)
        else:
            joined.append(part)
    return joined


def _cut(parts: Parts, dim: int, size: int, step: int) -> Parts | None:
    """Return the parts of x.unfold(dim, size, step): which patch, in place, and where in it, at the end."""
    dim %= len(parts)
    whole = math.prod(part.size for part in parts[dim])
    if size != step or whole % size:
        return None
    shape = [math.prod(part.size for part in each) for each in parts]
    split = _regrouped(parts, (*shape[:dim], whole // size, size, *shape[dim + 1 :]))
    return None if split is None else [*split[: dim + 1], *split[dim + 2 :], split[dim + 1]]


def _regrouped(parts: Parts, shape: tuple[int, ...]) -> Parts | None:
    """Distribute parts, outermost first, over the dimensions of `shape`; None where a part would be cut unevenly."""
    pending = [part for dim in parts for part in dim][::-1]
    dims: Parts = []
    for wanted in shape:
        taken: list[Part] = []
        rest = wanted
        while rest != 1:
            if not pending:
                return None
            part = pending.pop()
            if (fewer := divided(rest, part.size)) is not None:
                taken.append(part)
                rest = fewer
            elif (inner := divided(part.size, rest)) is not None:
                taken.append(Part(part.dim, rest, part.stride * inner))
                pending.append(Part(part.dim, inner, part.stride))
                rest = 1
            else:
                return None
        dims.append(taken)
    return dims
