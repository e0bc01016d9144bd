"""Exact: dimensions that are merged and taken apart again stay apart.

    [N, B, C] view [N, B·H, D] transpose [B·H, N, D] view [B, H, N, D]   ->   view [N, B, H, D] permute [B, H, N, D]

A dimension of tokens and images, or of tokens and heads, can't be followed everywhere where one of tokens can.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph import edit
from gtp_fx.graph.operators import PERMUTATIONS, VIEWS
from gtp_fx.graph.rearrangements import Part, Parts, chain_before, rearranged, whole_parts
from gtp_fx.graph.symbols import shape_of, written

_CHAINED = (*VIEWS, *PERMUTATIONS)


def fold_views(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of `gm` without such detours; `gm` itself where there are none."""
    if not any(map(_detour, gm.graph.nodes)):
        return gm
    gm = edit.copy_of(gm)
    # All are found before the first is folded: chains may have views in common.
    for node, steps in [(node, steps) for node in gm.graph.nodes if (steps := _detour(node))]:
        _fold(gm.graph, node, steps[-1])
    return edit.finish(gm)


def _detour(end: fx.Node) -> list[Parts] | None:
    """Return what the steps of a chain of views and permutations hold, where one is a detour; else None."""
    if end.target not in _CHAINED or all(user.target in _CHAINED for user in end.users):
        return None
    chain = chain_before(end)
    if any(node.target not in _CHAINED for node in chain) or sum(node.target in VIEWS for node in chain) < 2:
        return None
    steps: list[Parts] = []
    parts: Any = whole_parts(shape_of(_source(end)))
    for node in chain:
        if (parts := rearranged(parts, node)) is None:
            return None
        steps.append(parts)
    sizes = [part.size for dim in steps[-1] for part in dim]
    return steps if _writable(sizes) and _writable(shape_of(end)) and _taken_apart(steps) else None


def _fold(graph: fx.Graph, end: fx.Node, parts: Parts) -> None:
    """Replace the chain that ends in `end` by one view, permutation and view."""
    new = _source(end)
    # The source's dimensions, each cut into the parts that end in different places; then the order; then the result.
    row = [part for dim in parts for part in dim]
    in_order = sorted(row, key=lambda part: (part.dim, -part.stride))
    order = [in_order.index(part) for part in row]
    emit = edit.Emitter(graph, like=end, before=end)
    if (apart := tuple(part.size for part in in_order)) != shape_of(new):
        new = emit(aten.reshape.default, new, written(apart))
    if order != sorted(order):
        new = emit(aten.permute.default, new, order)
    if tuple(part.size for part in row) != shape_of(end):
        new = emit(aten.reshape.default, new, written(shape_of(end)))
    end.replace_all_uses_with(new)


def _source(end: fx.Node) -> fx.Node:
    """Return the value that a chain rearranges."""
    return chain_before(end)[0].all_input_nodes[0]


def _writable(shape: Sequence[int]) -> bool:
    """Tell whether a view can name a shape: one size of it may be known only when the graph runs."""
    return written(shape).count(-1) <= 1


def _taken_apart(steps: list[Parts]) -> bool:
    """Tell whether parts of two dimensions are merged at some step and are in two dimensions at the end."""
    final = {(part.dim, part.stride): at for at, dim in enumerate(steps[-1]) for part in dim}

    def place(part: Part) -> int:
        """Return where the innermost places of a part end up."""
        return final[min((key for key in final if key[0] == part.dim and key[1] >= part.stride), key=lambda k: k[1])]

    return any(
        first.dim != second.dim and place(first) != place(second)
        for step in steps[:-1]
        for dim in step
        for first, second in itertools.pairwise(dim)
    )
