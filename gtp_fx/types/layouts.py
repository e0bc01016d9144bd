"""From one layout of the same tokens to another, read off their types: into windows and out of them.

A type says which places of a grid each dimension runs over, so the operators that lead from [B, H, W, C] to
[B·windows, tokens, C] needn't be found in the model and repeated: both types are cut into the same atoms, and what is
left is a reshape, a permutation and a reshape, with the rolling and padding between that the grids tell of.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.errors import NotApplicable
from gtp_fx.graph.symbols import is_symbolic
from gtp_fx.types.axes import Dim, Factor, Grid, GridAxis, Plain, TensorType, split_tokens

Call = Callable[..., Any]
"""Inserts an operator call and returns its node: Call(target, *args)."""


class NoLayout(NotApplicable):
    """These types don't hold the same tokens; the message says what differs."""


def sides_layout(kind: TensorType, grid: Grid) -> TensorType:
    """[images, side 0, side 1, …, features] of `grid`: what lies between the layouts."""
    images = tuple(factor for factor in kind[0] if isinstance(factor, Plain))
    return (images or (Plain(1),), *((GridAxis(grid, side),) for side in range(len(grid.shape))), kind[-1])


def image_layout(region: TensorType) -> TensorType:
    """[1, side 0, side 1, …] of the tokens that a layout by window holds, before any rolling or padding.

    A grid that was pooled in place (mask units) holds every other place of its sides, or fewer.
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
    """[windows, tokens, features]: a layout by window of what all images share."""
    windows = tuple(f for f in split_tokens(region[0]) if isinstance(f, GridAxis))
    return (windows or (Plain(1),), region[1], features)


def convert(call: Call, value: Any, own: TensorType, wanted: TensorType) -> Any:
    """`value`, of type `own`, as `wanted`, whose grid may be `own`'s rolled or padded, or the other way around.

    Raises NoLayout. Both have one grid, whole, and the same images and features.
    """
    from_grid, to_grid = grid_of(own), grid_of(wanted)
    if from_grid == to_grid and not _overlap(own, wanted):
        return _arrange(call, value, own, wanted)
    steps = list(_steps(from_grid, to_grid))
    between, arrived = sides_layout(wanted, from_grid), sides_layout(wanted, to_grid)
    value = _arrange(call, value, own, between)
    for target, *args in steps:
        value = call(target, value, *args)
    return _arrange(call, value, arrived, wanted)


def grid_of(kind: TensorType) -> Grid:
    """The one grid that a type runs over."""
    grids = {f.grid for dim in kind for f in split_tokens(dim) if isinstance(f, GridAxis)}
    if len(grids) != 1:
        raise NoLayout("it runs over no grid, or over several")
    return grids.pop()


def made_from(grid: Grid) -> list[Grid]:
    """The grid, what it was rolled or padded from, what that was, and so on."""
    chain = [grid]
    while grid.shift or grid.inside is not None:
        grid = grid.rolled([-by for by in grid.shift]) if grid.shift else grid.inside or grid
        chain.append(grid)
    return chain


def base_of(grid: Grid) -> Grid:
    """The grid that a region, a rolled or a padded grid comes from."""
    return made_from(grid.parts[0].grid if grid.parts else grid)[-1]


def _steps(start: Grid, end: Grid) -> Iterator[tuple[Any, ...]]:
    """Operators on [images, sides…, features] that lead from one grid to the other."""
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
    sides = list(range(1, len(grid.shape) + 1))
    if grid.shift:
        yield aten.roll.default, list(grid.shift), sides
        return
    more = [big - small for big, small in zip(grid.shape, below.shape, strict=True)]
    # aten.pad counts from the last dimension, here features, in pairs of before and behind.
    yield aten.constant_pad_nd.default, [0, 0, *(n for by in reversed(more) for n in (0, by))]


def _undone(grid: Grid, below: Grid) -> Iterator[tuple[Any, ...]]:
    if grid.shift:
        yield aten.roll.default, [-by for by in grid.shift], list(range(1, len(grid.shape) + 1))
        return
    for side, size in enumerate(below.shape):
        yield aten.slice.Tensor, side + 1, 0, size


def _arrange(call: Call, value: Any, own: TensorType, wanted: TensorType) -> Any:
    """The same grid in another order: reshape to atoms, permute, reshape."""
    cuts = _cuts([*own, *wanted])
    mine = [_atoms(dim, cuts) for dim in own]
    theirs = [_atoms(dim, cuts) for dim in wanted]
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
    """Windows of neighbours on one side, places far apart on the other: the grid's own order lies between."""
    cuts = _cuts([*own, *wanted])
    try:
        for dim in (*own, *wanted):
            _atoms(dim, cuts)
    except NoLayout:
        return True
    return False


_Cuts = dict[tuple[Grid, int], set[int]]


def _cuts(dims: Sequence[Dim]) -> _Cuts:
    """For each side of each grid, the strides at which any factor begins or ends."""
    cuts: _Cuts = {}
    for factor in (f for dim in dims for f in split_tokens(dim) if isinstance(f, GridAxis)):
        cuts.setdefault((factor.grid, factor.side), set()).update({factor.stride, factor.stride * factor.whole_size})
    return cuts


def _atoms(dim: Dim, cuts: _Cuts) -> list[Factor]:
    """The factors of `dim`, cut wherever any other factor of their side is."""
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
    """Tells atoms apart: images from features as many."""
    return "images" if isinstance(atom, Plain) and atom.images else repr(atom)


def _shape(dims: Sequence[Sequence[Factor]]) -> list[int]:
    """Sizes, the one that follows the batch as -1."""
    sizes = []
    for dim in dims:
        size = 1
        for factor in dim:
            size *= factor.whole_size
        sizes.append(-1 if is_symbolic(size) else size)
    return sizes
