"""Places of a stream's patches on the grid that they were born on, where the stream has them in another order.

Tokens may come column by column, in blocks of 2 x 2, rolled, flipped, or as numbers in a tensor pick them. The types
say which it is. `home_of` finds the grid that is row-major, and `places_of` inserts what arranges its coordinates just
as the tokens were arranged. So a permuted stream has the neighbours that the stream in order has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from torch import fx
from torch.ops import aten, gtp_fx  # type: ignore[import-not-found]

from gtp_fx.graph.symbols import shape_of
from gtp_fx.types.axes import Plain, TokenAxis, TokenDomain
from gtp_fx.types.grids import Grid
from gtp_fx.types.layouts import Call, convert, sides_layout


def covers(region: Grid) -> bool:
    """Return whether a grid made of parts of another one's sides has all its places: another order, and no window."""
    return math.prod(region.shape) == math.prod(region.parts[0].grid.shape)


def is_window(grid: Grid) -> bool:
    """Return whether a grid is one window of several, or another part of a larger grid."""
    return bool(grid.parts) and not covers(grid)


def home_of(grid: Grid) -> Grid:
    """Return the grid that has the patches of `grid` in row-major order, and perhaps more: itself if that is in order.

    A padded grid, and a window, are in order as they are.
    """
    if grid.picked is not None:
        return home_of(grid.picked.grid) if grid.picked.index else grid
    if grid.parts:
        return home_of(grid.parts[0].grid) if covers(grid) else grid
    return replace(grid, shift=(), flipped=())


def places_of(call: Call, grid: Grid, like: fx.Node, node_named: Callable[[str], fx.Node]) -> fx.Node | None:
    """Insert the coordinates of a stream's patches on `home_of(grid)`, [1 or B, G, R]; None where they are in order.

    like: any tensor on the stream's device. node_named: finds the nodes that types name.
    """
    home = home_of(grid)
    if grid == home:
        return None
    if grid.picked is not None:
        return _picked(call, grid, like, node_named)
    in_order = call(gtp_fx.grid_places.default, home.sides, like)
    wanted = ((Plain(1),), (TokenAxis(TokenDomain(grid)),), (Plain(len(home.shape)),))
    return convert(call, in_order, sides_layout(wanted, home), wanted)  # type: ignore[no-any-return]


def _picked(call: Call, grid: Grid, like: fx.Node, node_named: Callable[[str], fx.Node]) -> fx.Node:
    """Insert the coordinates of picked tokens: the picks among the coordinates of what they were picked from."""
    picked = grid.picked
    assert picked is not None
    home = home_of(picked.grid)
    before = places_of(call, picked.grid, like, node_named)
    if before is None:
        sides = call(gtp_fx.grid_places.default, home.sides, like)
        before = call(aten.reshape.default, sides, [1, -1, len(home.shape)])
    index = picks_of(call, grid, node_named)
    if picked.own:
        return call(gtp_fx.take_tokens.default, before, index, 0, 1, 0, 0)  # type: ignore[no-any-return]
    return call(aten.index_select.default, before, 1, index)  # type: ignore[no-any-return]


def picks_of(call: Call, grid: Grid, node_named: Callable[[str], fx.Node]) -> fx.Node:
    """Insert the numbers, from 0, of picked tokens in the row that they were picked from: [K], or [B, K] by image."""
    picked = grid.picked
    assert picked is not None
    index: fx.Node = node_named(picked.index)
    for _ in range(len(shape_of(index)) - (2 if picked.own else 1)):
        index = call(aten.select.int, index, -1, 0)
    return call(aten.remainder.Scalar, index, math.prod(picked.grid.shape))  # type: ignore[no-any-return]
