"""Patches cut out of an image by views alone, without a convolution: another place where a grid is born.

[B, C, h·p, w·p] -> view [B, C, h, p, w, p] -> permute [B, h, w, p, p, C] -> view [B, h·w, p·p·C]
"""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph.nodes import ancestors
from gtp_fx.graph.operators import ATTENTION, CONVOLUTIONS, MATRIX_PRODUCTS, VIEWS
from gtp_fx.graph.symbols import shape_of
from gtp_fx.types.axes import Factor, Grid, GridAxis, Plain

_LAYERS = (
    *CONVOLUTIONS,
    aten.linear.default,
    *MATRIX_PRODUCTS,
    *ATTENTION,
)


def unfolded(view: fx.Node) -> list[Factor] | None:
    """Return the factors of what `view` regroups, outermost first, if it puts an image's patches in a row; else None.

    Two or more dimensions of one value must have been split in two, and their outer halves put side by side, with the
    batch before them. Features regrouped in this way would be windows or heads, so no layer may have computed the
    value.
    """
    permute: Any = view.args[0]
    split: Any = permute.args[0] if permute.target is aten.permute.default else None
    if split is None or split.target not in VIEWS:
        return None
    counts = _outer_halves(shape_of(split.args[0]), shape_of(split))
    order = [position % len(shape_of(split)) for position in permute.args[1]]
    places = [order.index(count) for count in counts]
    if len(places) < 2 or places != list(range(places[0], places[0] + len(places))):
        return None
    if order[0] != 0 or 0 in counts or any(node.target in _LAYERS for node in ancestors(split)):
        return None
    sizes = shape_of(split)
    grid = Grid(view.name, tuple(sizes[count] for count in counts))
    return [GridAxis(grid, counts.index(dim)) if dim in counts else Plain(sizes[dim], images=dim == 0) for dim in order]


def _outer_halves(before: tuple[int, ...], after: tuple[int, ...]) -> list[int]:
    """Return which dimensions of `after` are the outer of two that one dimension of `before` was split into."""
    halves, dim = [], 0
    for size in before:
        first, product = dim, 1
        while dim < len(after) and (product < size or dim == first):
            product *= after[dim]
            dim += 1
        if product != size:
            return []
        if dim - first == 2 and after[first] > 1:
            halves.append(first)
    return halves
