"""Fused projections: one linear layer of which several readers take a part each, as q, k and v of one weight."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.capture.layers import stays_whole
from gtp_fx.graph.nodes import only_user
from gtp_fx.graph.operators import PERMUTATIONS, REARRANGED, SQUEEZES
from gtp_fx.graph.rearrangements import order_of
from gtp_fx.graph.symbols import shape_of
from gtp_fx.types.rules.views import is_view


@dataclass(frozen=True)
class Part:
    """One reader of a fused projection: a select or a slice.

    node: the reader.
    start, stop: the units that it takes, of those that the projection's outermost split of the features has.
    """

    node: fx.Node
    start: int
    stop: int


@dataclass(frozen=True)
class FusedProjection:
    """Nodes linear → (view → (permute)) → several readers, each of which takes a run of rows of the weight.

    linear: the projection.
    view: splits its features; None where they aren't split.
    permute: a permutation or transposition of that; None where there is none.
    unit_dim: the view's dimension that counts units, or the projection's last.
    rows: rows of the weight in a unit.
    parts: the readers, in the order of the rows.
    """

    linear: fx.Node
    view: fx.Node | None
    permute: fx.Node | None
    unit_dim: int
    rows: int
    parts: tuple[Part, ...]


def match_fused(linear: fx.Node) -> FusedProjection | None:
    """Return the fused projection that a linear layer begins; None where it begins none."""
    if linear.target is not aten.linear.default:
        return None
    view, permute, source = None, None, linear
    unit_dim = dim = len(shape_of(linear)) - 1
    features = units = shape_of(linear)[-1]
    # Go forward through a view that splits the features, and what puts its dimensions into another order.
    if (only := only_user(source)) is not None and is_view(only):
        view = source = only
        shape = shape_of(view)
        split = [d for d in range(len(shape)) if math.prod(shape[d:]) == features]
        if not split:
            return None
        unit_dim = dim = split[0]
        units = shape[unit_dim]
        if (only := only_user(source)) is not None and only.target in PERMUTATIONS:
            permute = source = only
            dim = order_of(permute).index(unit_dim)
        source = _after_idle(source)
    parts = [_part(user, source, dim) for user in source.users]
    if not parts or any(part is None for part in parts):
        return None
    found = sorted((part for part in parts if part is not None), key=lambda part: part.start)
    if any(first.stop > second.start for first, second in itertools.pairwise(found)):
        return None
    return FusedProjection(linear, view, permute, unit_dim, features // units, tuple(found))


def rows_for(nodes: Collection[fx.Node]) -> dict[fx.Node, int]:
    """Return the rows that are for `nodes`, of each projection among them that can be split and has others too."""
    found = {}
    for node in nodes:
        fused, gm = match_fused(node), node.graph.owning_module
        if fused is not None and gm is not None and not stays_whole(gm, node):
            units = [part.stop - part.start for part in fused.parts if part.node in nodes]
            if 0 < len(units) < len(fused.parts):
                found[node] = sum(units) * fused.rows
    return found


def _after_idle(node: fx.Node) -> fx.Node:
    """Go forward through copies, and through a dimension that is put in and taken out again."""
    while (only := only_user(node)) is not None:
        if only.target is aten.unsqueeze.default and (after := only_user(only)) is not None:
            only = after if after.target in SQUEEZES else only
        if only.target not in (*REARRANGED, *SQUEEZES) or shape_of(only) != shape_of(node):
            return node
        node = only
    return node


def _part(reader: fx.Node, source: fx.Node, dim: int) -> Part | None:
    """Return what a reader takes of `source` along `dim`; None where it does anything else."""
    if reader.target not in (aten.select.int, aten.slice.Tensor) or reader.args[0] is not source:
        return None
    size, args = shape_of(source)[dim], (*reader.args, *(None,) * 4)
    if (args[1] or 0) % len(shape_of(source)) != dim:  # type: ignore[operator]
        return None
    if reader.target is aten.select.int:
        at: Any = args[2]
        return Part(reader, at % size, at % size + 1) if isinstance(at, int) else None
    start, stop = (0 if args[2] is None else args[2]), (size if args[3] is None else args[3])
    if not isinstance(start, int) or not isinstance(stop, int) or args[4] not in (None, 1):
        return None
    start, stop, _ = slice(start, stop).indices(size)
    return Part(reader, start, stop) if start < stop else None
