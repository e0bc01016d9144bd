"""Patches cut out of an image or a series by views alone, without a convolution: another place where a grid is born.

[B, C, h·p, w·p] -> view [B, C, h, p, w, p] -> permute [B, h, w, p, p, C] -> view [B, h·w, p·p·C]
[B, C, l·p]      -> view [B, C, l, p]       -> permute [B, l, p, C]       -> view [B, l, p·C]

How many views and permutations it takes doesn't matter: all of them are followed back to the value that they rearrange.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph.nodes import ancestors
from gtp_fx.graph.operators import ATTENTION, CONVOLUTIONS, MATRIX_PRODUCTS, PERMUTATIONS, REARRANGED, VIEWS
from gtp_fx.graph.symbols import divided, shape_of
from gtp_fx.types.axes import Factor, Grid, GridAxis, Plain

_LAYERS = (
    *CONVOLUTIONS,
    aten.linear.default,
    *MATRIX_PRODUCTS,
    *ATTENTION,
)
_REARRANGING = (*VIEWS, *PERMUTATIONS, *REARRANGED, aten.unfold.default)


@dataclass(frozen=True)
class _Part:
    """A dimension of a value, or a part of one: `size` places, `stride` apart."""

    dim: int
    size: int
    stride: int


_Parts = list[list[_Part]]
"""The parts that each dimension of a rearranged value is made of, outermost first."""


def unfolded(view: fx.Node) -> list[Factor] | None:
    """Return the factors of what `view` regroups, outermost first, if it puts an image's patches in a row; else None.

    Two or more dimensions of one value must have been split in two, and their outer halves put side by side, with the
    batch before them; one, where the value is [batch, channels, places]. Features regrouped in this way would be
    windows or heads, so no layer may have computed the value.
    """
    chain = _chain(view)
    source: Any = view.args[0] if not chain else chain[0].args[0]
    sizes = shape_of(source)
    merged: _Parts | None = [[_Part(dim, size, 1)] for dim, size in enumerate(sizes)]
    for node in (*chain, view):
        merged = None if merged is None else _rearranged(merged, node)
    if merged is None or all(node.target in VIEWS for node in chain):
        return None
    row = [part for dim in merged for part in dim]
    counts = list(_outer_halves(row, sizes))
    places = [row.index(count) for count in counts]
    few = 1 if len(sizes) == 3 and len(shape_of(view)) == 3 and math.prod(shape_of(view)[2:]) > 1 else 2
    if len(places) < few or places != list(range(places[0], places[0] + len(places))):
        return None
    if row[:1] != [_Part(0, sizes[0], 1)] or any(node.target in _LAYERS for node in (source, *ancestors(source))):
        return None
    grid = Grid(view.name, tuple(count.size for count in counts))
    return [GridAxis(grid, counts.index(p)) if p in counts else Plain(p.size, images=p.dim == 0) for p in row]


def _chain(view: fx.Node) -> list[fx.Node]:
    """Return the rearranging operators before `view`, the first one first."""
    chain: list[fx.Node] = []
    node: Any = view.args[0]
    while isinstance(node, fx.Node) and node.target in _REARRANGING:
        chain.insert(0, node)
        node = node.args[0]
    return chain


def _rearranged(parts: _Parts, node: fx.Node) -> _Parts | None:
    """Return the parts of a rearranging operator's result; None where they can't be told."""
    if node.target in VIEWS:
        return _regrouped(parts, shape_of(node))
    if node.target is aten.permute.default:
        order: Any = node.args[1]
        return [parts[dim] for dim in order]
    if node.target is aten.transpose.int:
        a, b = (dim % len(parts) for dim in node.args[1:])  # type: ignore[operator]
        swapped = {a: b, b: a}
        return [parts[swapped.get(dim, dim)] for dim in range(len(parts))]
    if node.target is aten.unfold.default:
        return _cut(parts, *node.args[1:])  # type: ignore[arg-type]
    return parts


def _cut(parts: _Parts, dim: int, size: int, step: int) -> _Parts | None:
    """Return the parts of x.unfold(dim, size, step): which patch, in place, and where in it, at the end."""
    dim %= len(parts)
    whole = math.prod(part.size for part in parts[dim])
    if size != step or whole % size:
        return None
    shape = [*(math.prod(part.size for part in each) for each in parts)]
    split = _regrouped(parts, (*shape[:dim], whole // size, size, *shape[dim + 1 :]))
    return None if split is None else [*split[: dim + 1], *split[dim + 2 :], split[dim + 1]]


def _regrouped(parts: _Parts, shape: tuple[int, ...]) -> _Parts | None:
    """Distribute parts, outermost first, over the dimensions of `shape`; None where a part would be cut unevenly."""
    pending = [part for dim in parts for part in dim if part.size != 1][::-1]
    dims: _Parts = []
    for wanted in shape:
        taken: list[_Part] = []
        rest = wanted
        while rest != 1:
            if not pending:
                return None
            part = pending.pop()
            if (fewer := divided(rest, part.size)) is not None:
                taken.append(part)
                rest = fewer
            elif (inner := divided(part.size, rest)) is not None:
                taken.append(_Part(part.dim, rest, part.stride * inner))
                pending.append(_Part(part.dim, inner, part.stride))
                rest = 1
            else:
                return None
        dims.append(taken)
    return dims


def _outer_halves(row: list[_Part], sizes: tuple[int, ...]) -> Iterator[_Part]:
    """Yield the outer of the two parts of each dimension that is split in two. `row`: all parts of all dimensions."""
    for dim in range(len(sizes)):
        halves = sorted((part for part in row if part.dim == dim), key=lambda part: -part.stride)
        if len(halves) == 2:
            yield halves[0]
