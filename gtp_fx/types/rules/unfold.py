"""Patches cut out of an image or a series by views alone, without a convolution: another place where a grid is born.

[B, C, h·p, w·p] -> view [B, C, h, p, w, p] -> permute [B, h, w, p, p, C] -> view [B, h·w, p·p·C]
[B, C, l·p]      -> view [B, C, l, p]       -> permute [B, l, p, C]       -> view [B, l, p·C]

How many views and permutations it takes doesn't matter: all of them are followed back to the value that they rearrange.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph.nodes import ancestors
from gtp_fx.graph.operators import ATTENTION, CONVOLUTIONS, MATRIX_PRODUCTS, VIEWS
from gtp_fx.graph.rearrangements import Part, Parts, chain_before, rearranged, whole_parts
from gtp_fx.graph.symbols import shape_of
from gtp_fx.types.axes import Factor, Plain
from gtp_fx.types.grids import Grid, GridAxis

_LAYERS = (
    *CONVOLUTIONS,
    aten.linear.default,
    *MATRIX_PRODUCTS,
    *ATTENTION,
)


def unfolded(view: fx.Node) -> list[Factor] | None:
    """Return the factors of what `view` regroups, outermost first, if it puts an image's patches in a row; else None.

    Two or more dimensions of one value must have been split in two, and their outer halves put side by side, with the
    batch before them; one, where the value is [batch, channels, places] or a strip of patches side by side. Features
    regrouped in this way would be windows or heads, so no layer may have computed the value.
    """
    chain = chain_before(view)
    source: Any = chain[0].args[0]
    sizes = shape_of(source)
    merged: Parts | None = whole_parts(sizes)
    for node in chain:
        merged = None if merged is None else rearranged(merged, node)
    if merged is None or all(node.target in VIEWS for node in chain):
        return None
    row = [part for dim in merged for part in dim]
    counts = list(_outer_halves(row, sizes))
    places = [row.index(count) for count in counts]
    # One side is enough where all the rest is features: of a series, or a strip as high as its patches.
    few = 1 if len(sizes) in (3, 4) and len(shape_of(view)) == 3 and math.prod(shape_of(view)[2:]) > 1 else 2
    if len(places) < few or places != list(range(places[0], places[0] + len(places))):
        return None
    if row[:1] != [Part(0, sizes[0], 1)] or any(node.target in _LAYERS for node in (source, *ancestors(source))):
        return None
    grid = Grid(view.name, tuple(count.size for count in counts))
    return [GridAxis(grid, counts.index(p)) if p in counts else Plain(p.size, images=p.dim == 0) for p in row]


def _outer_halves(row: list[Part], sizes: tuple[int, ...]) -> Iterator[Part]:
    """Yield the outer of the two parts of each dimension that is split in two. `row`: all parts of all dimensions."""
    for dim in range(len(sizes)):
        halves = sorted((part for part in row if part.dim == dim), key=lambda part: -part.stride)
        if len(halves) == 2:
            yield halves[0]
