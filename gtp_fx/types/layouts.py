"""Conversion between two layouts of the same tokens, read off their types: into windows and out of them.

A type says which places of a grid each dimension runs over. So the operators that lead from [B, H, W, C] to [B·windows,
tokens, C] needn't be found in the model and repeated. Both types are cut into the same atoms; a reshape, a permutation
and a reshape then convert one into the other, with the rolling and padding between that the grids record.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.errors import NotApplicable
from gtp_fx.graph.symbols import written
from gtp_fx.types.axes import Dim, Factor, Plain, TensorType
from gtp_fx.types.grids import Grid, GridAxis
from gtp_fx.types.merging import split_tokens

Call = Callable[..., Any]
"""A function that inserts an operator call and returns its node: Call(target, *args)."""


class NoLayout(NotApplicable):
    """The types don't hold the same tokens; the message says what differs."""


def sides_layout(kind: TensorType, grid: Grid) -> TensorType:
    """Return the layout between all others, [images, side 0, side 1, …, features] of `grid`."""
    images = tuple(factor for factor in kind[0] if isinstance(factor, Plain))
    return (images or (Plain(1),), *((GridAxis(grid, side),) for side in range(len(grid.shape))), kind[-1])


def image_layout(region: TensorType) -> TensorType:
    """Return [1, side 0, side 1, …] of the tokens that a layout by window holds, before any rolling or padding.

    A grid that was pooled in place (mask units) holds every second place of its sides, or fewer.
    """
    grid = grid_of(region)
    base = base_of(grid)
    if base != grid:
        return ((Plain(1),), *((GridAxis(base, side),) for side in range(len(base.shape))))
    sides = []
    for side in range(len(grid.shape)):
        parts = [f for dim in region for f in split_tokens(dim) if isinstance(f, GridAxis) and f.side == side]
        count = math.prod(part.whole_size for part in parts)
        sides.append((GridAxis(grid, side, count, min(part.stride for part in parts)).canonical(),))
    return ((Plain(1),), *sides)


def by_window(region: TensorType, features: Dim) -> TensorType:
    """Return the layout by window of a value that all images share: [windows, tokens, features]."""
    windows = tuple(f for f in split_tokens(region[0]) if isinstance(f, GridAxis))
    return (windows or (Plain(1),), region[1], features)


def convert(call: Call, value: Any, own: TensorType, wanted: TensorType) -> Any:
    """Insert what brings `value` from the type `own` to the type `wanted`; return its node.

    Each type has one grid, whole, and both have the same images and features. One grid may be the other, rolled,
    flipped or padded. Raises NoLayout where they hold other tokens.
    """
    if own == wanted:
        return value
    from_grid, to_grid = grid_of(own), grid_of(wanted)
    # One grid, cut alike: no step between is needed.
    if from_grid == to_grid and not _overlap(own, wanted):
        return _arrange(call, value, own, wanted)
    # Otherwise go by the grid's own order, in which it is rolled and padded.
    steps = list(_steps(from_grid, to_grid))
    between, arrived = sides_layout(wanted, from_grid), sides_layout(wanted, to_grid)
    value = _arrange(call, value, own, between)
    for target, *args in steps:
        value = call(target, value, *args)
    return _arrange(call, value, arrived, wanted)


def grid_of(kind: TensorType) -> Grid:
    """Return the one grid that a type runs over. Raises NoLayout where there is none, or several."""
    grids = {f.grid for dim in kind for f in split_tokens(dim) if isinstance(f, GridAxis)}
    if len(grids) != 1:
        raise NoLayout("it runs over no grid, or over several")
    return grids.pop()


def made_from(grid: Grid) -> list[Grid]:
    """Return the grid, the one that it was rolled, flipped or padded from, that one's, and so on."""
    chain = [grid]
    while grid.shift or grid.flipped or grid.inside is not None:
        if grid.shift:
            grid = grid.rolled([-by for by in grid.shift])
        else:
            grid = grid.turned(grid.flipped) if grid.flipped else grid.inside or grid
        chain.append(grid)
    return chain


def base_of(grid: Grid) -> Grid:
    """Return the grid that a region, a rolled, flipped or padded grid comes from."""
    return made_from(grid.parts[0].grid if grid.parts else grid)[-1]


def _steps(start: Grid, end: Grid) -> Iterator[tuple[Any, ...]]:
    """Yield the operators on [images, sides…, features] that lead from one grid to the other."""
    # Undo rolling and padding down to a grid that both are made from, then redo the other's.
    down, up = made_from(start), made_from(end)
    common = next((grid for grid in down if grid in up), None)
    if common is None:
        raise NoLayout("they are two grids")
    for grid, below in itertools.pairwise(down):
        if grid == common:
            break
        yield from _undone(grid, below)
    path = up[: up.index(common) + 1]
    for below, grid in zip(path[::-1], path[-2::-1], strict=False):
        yield from _done(grid, below)


def _done(grid: Grid, below: Grid) -> Iterator[tuple[Any, ...]]:
    """Yield the operator that makes `grid` from the one `below`."""
    sides = list(range(1, len(grid.shape) + 1))
    if grid.shift:
        yield aten.roll.default, list(grid.shift), sides
        return
    if grid.flipped:
        yield aten.flip.default, [1 + side for side in grid.flipped]
        return
    more = [big - small for big, small in zip(grid.shape, below.shape, strict=True)]
    # aten.pad counts from the last dimension, here features, in pairs of before and after.
    yield aten.constant_pad_nd.default, [0, 0, *(n for by in reversed(more) for n in (0, by))]


def _undone(grid: Grid, below: Grid) -> Iterator[tuple[Any, ...]]:
    """Yield the operators that make the grid `below` from `grid`."""
    if grid.shift:
        yield aten.roll.default, [-by for by in grid.shift], list(range(1, len(grid.shape) + 1))
        return
    if grid.flipped:
        yield aten.flip.default, [1 + side for side in grid.flipped]
        return
    for side, size in enumerate(below.shape):
        yield aten.slice.Tensor, side + 1, 0, size


def _arrange(call: Call, value: Any, own: TensorType, wanted: TensorType) -> Any:
    """Insert what brings the same grid into another order: reshape to atoms, permute, reshape."""
    cuts = _cuts([*own, *wanted])
    mine = [_atoms(dim, cuts) for dim in own]
    theirs = [_atoms(dim, cuts) for dim in wanted]
    # The same atoms have to be on both sides, each once; then a permutation leads from one order to the other.
    flat, order = [a for dim in mine for a in dim], [a for dim in theirs for a in dim]
    names, wanted_names = list(map(_name, flat)), list(map(_name, order))
    if sorted(names) != sorted(wanted_names) or len(set(names)) != len(names):
        raise NoLayout("the two layouts don't hold the same places")
    permutation = [names.index(name) for name in wanted_names]
    if [len(dim) for dim in mine] != [1] * len(mine):
        value = call(aten.reshape.default, value, _shape([[atom] for atom in flat]))
    if permutation != list(range(len(permutation))):
        value = call(aten.permute.default, value, permutation)
    if [len(dim) for dim in theirs] != [1] * len(theirs):
        value = call(aten.reshape.default, value, _shape(theirs))
    return value


def _overlap(own: TensorType, wanted: TensorType) -> bool:
    """Return whether windows of the two layouts overlap: neighbours on one side, places far apart on the other.

    The grid's own order then has to come between.
    """
    cuts = _cuts([*own, *wanted])
    try:
        for dim in (*own, *wanted):
            _atoms(dim, cuts)
    except NoLayout:
        return True
    return False


_Cuts = dict[tuple[Grid, int], set[int]]


def _cuts(dims: Sequence[Dim]) -> _Cuts:
    """Return, for each side of each grid, the strides at which any factor begins or ends."""
    cuts: _Cuts = {}
    for factor in (f for dim in dims for f in split_tokens(dim) if isinstance(f, GridAxis)):
        cuts.setdefault((factor.grid, factor.side), set()).update({factor.stride, factor.stride * factor.whole_size})
    return cuts


def _atoms(dim: Dim, cuts: _Cuts) -> list[Factor]:
    """Return the factors of `dim`, cut wherever any other factor of their side is cut."""
    atoms: list[Factor] = []
    for factor in split_tokens(dim):
        if not isinstance(factor, GridAxis):
            atoms.append(factor)
            continue
        inside = sorted(
            (c for c in cuts[factor.grid, factor.side] if factor.stride < c < factor.stride * factor.whole_size),
            reverse=True,
        )
        for cut in inside:
            reach = factor.stride * factor.whole_size
            if reach % cut or cut % factor.stride:
                raise NoLayout("windows of the two layouts overlap")
            outer, factor = factor.split(reach // cut)
            atoms.append(outer)
        atoms.append(factor)
    return [atom for atom in atoms if atom.whole_size != 1]


def _name(atom: Factor) -> str:
    """Return a name that is different for each atom of a dimension, and for images and as many features."""
    return "images" if isinstance(atom, Plain) and atom.images else repr(atom)


def _shape(dims: Sequence[Sequence[Factor]]) -> list[int]:
    """Return the sizes, with -1 for the one that depends on the batch."""
    return written(math.prod(factor.whole_size for factor in dim) for dim in dims)
