"""Dimensions that reshapes make of others: factors merged into one, and taken apart again.

A dimension has one spelling, so that two ways to the same shape give the same type: plain factors side by side are one,
factors of size one are gone, parts of a side are joined, and all sides of a grid, in order, are its row of tokens. This
is where a row of tokens is born, and where a window's is.
"""

from __future__ import annotations

from collections.abc import Sequence

from gtp_fx.graph.symbols import is_symbolic
from gtp_fx.types.axes import Dim, Factor, Plain, TensorType, TokenAxis, TokenDomain
from gtp_fx.types.grids import Grid, GridAxis


def product(factors: Sequence[Factor]) -> Dim:
    """Return the dimension that these factors make up, without factors of size one, which carry no information."""
    return tuple(merge_plain([factor for factor in factors if factor.whole_size != 1])) or (Plain(1),)


def _is_fixed(factor: Plain) -> bool:
    """Return whether a factor is never merged: images, and other sizes known only when the graph runs."""
    return factor.images or is_symbolic(factor.size)


def merge_plain(factors: Sequence[Factor]) -> list[Factor]:
    """Merge adjacent plain factors into one: 4·6 and 6·4 are the same."""
    merged: list[Factor] = []
    for factor in factors:
        last = merged[-1] if merged else None
        if isinstance(factor, Plain) and isinstance(last, Plain) and not (_is_fixed(factor) or _is_fixed(last)):
            merged[-1] = Plain(last.size * factor.size)
        else:
            merged.append(factor)
    return merged


def merge_grids(dim: Dim) -> Dim:
    """Join parts of a side, and replace each full row-major run of a grid's sides by the token axis that it is.

    This is where a domain is born: (GridAxis(g, 0), GridAxis(g, 1)) is the patch tokens of g. A dimension made of parts
    of two sides or more is the tokens of a region: of a window, or of one frame of a video. Where it holds anything
    else (images), its parts stay as they are.
    """
    merged: list[Factor] = []
    for factor in dim:
        last = merged[-1] if merged else None
        joined = last.joined(factor) if isinstance(last, GridAxis) and isinstance(factor, GridAxis) else None
        merged[-1:] = [joined] if joined is not None else [*merged[-1:], factor]
    # Adjacent parts are joined by now, so a run of whole sides is one axis.
    i = 0
    while i < len(merged):
        factor = merged[i]
        if isinstance(factor, GridAxis):
            sides = long_sides(factor.grid)
            if merged[i : i + len(sides)] == sides:
                merged[i : i + len(sides)] = [TokenAxis(TokenDomain(factor.grid))]
        i += 1
    return _region(tuple(merged))


def long_sides(grid: Grid) -> list[Factor]:
    """Return the sides of a grid that are longer than one patch, or all where none is: those that a row shows."""
    sides = [GridAxis(grid, side) for side in range(len(grid.shape))]
    return [side for side in sides if side.whole_size != 1] or list(sides)


def in_rows(kind: TensorType) -> TensorType:
    """Return the type with a token axis in the place of a side that is all of its grid, where features come after it.

    It is all of a series, and of a strip one patch high whose other side is gone. Before features, [B, L, C], it is a
    row of tokens; after them, [B, C, L], it may still be a map.
    """
    held = [f.grid for dim in kind for f in dim if isinstance(f, GridAxis)]

    def row(dim: Dim) -> Dim:
        (factor,) = dim if len(dim) == 1 else (None,)
        if not isinstance(factor, GridAxis) or held.count(factor.grid) != 1:
            return dim
        return merge_grids(dim) if long_sides(factor.grid) == [factor] else dim

    return (*map(row, kind[:-1]), *kind[-1:])


def _region(dim: Dim) -> Dim:
    """Return the token axis of a region where `dim` is parts of several sides of a grid, in any order; else `dim`."""
    parts = tuple(factor for factor in dim if isinstance(factor, GridAxis))
    if not parts or len(parts) != len(dim) or len({part.grid for part in parts}) > 1:
        return dim
    grid = parts[0].grid
    long = {side for side, size in enumerate(grid.shape) if size != 1}
    if len({part.side for part in parts} & long) < 2:
        return dim
    shape = tuple(part.whole_size for part in parts)
    strides = "x".join(f"{part.side}_{part.whole_size}by{part.stride}" for part in parts)
    rolled = "".join(f"_{by}" for by in grid.shift)
    return (TokenAxis(TokenDomain(Grid(f"{grid.birth}{rolled}_{strides}", shape, parts=parts))),)


def split_tokens(dim: Dim) -> Dim:
    """Undo `merge_grids` where a whole token axis without prefix can be seen as its grid again."""
    return tuple(part for factor in dim for part in _sides(factor))


def _sides(factor: Factor) -> Sequence[Factor]:
    """Return a factor as the sides of its grid, where it is a whole token axis of patches alone."""
    if not isinstance(factor, TokenAxis) or factor.prefix or factor.suffix or factor.domain.level:
        return [factor]
    grid = factor.domain.grid
    return grid.parts or [GridAxis(grid, side) for side in range(len(grid.shape))]
