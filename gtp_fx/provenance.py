"""Which original patches each remaining token stands for, and by how much.

What a site does is linear in the tokens: with GTP x_kept + alpha * Â[kept, propagated] x_propagated. Carried out on the identity
instead of features, it gives a matrix: entry (k, g) is the weight of patch g in token k. With GTP row sums are the token scales.
With it, whatever belongs to patches (labels, masks, distillation targets) can be carried along: `matrix @ labels`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.ops import aten, gtp_fx  # type: ignore[import-not-found]

from gtp_fx.axes import Grid
from gtp_fx.graphs import call, returning
from gtp_fx.passes.insert_propagation import SITE
from gtp_fx.strategies.protocol import Removal


@dataclass(frozen=True, eq=False)
class Provenance:
    """Of one stream of tokens: patches of a grid (row-major), after the last site.

    matrix [B, K, G]: weight of each of the grid's G patches in each of the K tokens left. index [B, K]: where on the grid
    those tokens stood, ascending.
    """

    grid: tuple[int, ...]
    matrix: Tensor
    index: Tensor


def provenance_runner(gm: fx.GraphModule) -> Callable[..., tuple[Provenance, ...]]:
    """A function of the model's inputs: one `Provenance` for each stream of `gm` that tokens leave."""
    streams: dict[Grid, list[fx.Node]] = {}

    def results(copies: dict[fx.Node, fx.Node]) -> list[fx.Node]:
        for node in copies:
            if SITE in node.meta:
                streams.setdefault(node.meta[SITE][0], []).append(node)
        return [value for grid, sites in streams.items() for value in _carried(grid, sites, copies)]

    runner = returning(gm, results)

    def run(*args: Any, **kwargs: Any) -> tuple[Provenance, ...]:
        flat = runner(*args, **kwargs)
        return tuple(Provenance(grid.shape, flat[2 * i], flat[2 * i + 1]) for i, grid in enumerate(streams))

    return run


def _carried(grid: Grid, sites: list[fx.Node], copies: dict[fx.Node, fx.Node]) -> tuple[fx.Node, fx.Node]:
    """What the sites did to a stream, from the first to the last, done to the identity: the matrix, and the index.

    sites: nodes of the graph that was copied, whose strategy's states speak of its nodes. copies: each one's copy.
    """
    removals: list[Removal] = [site.meta[SITE][1].removal for site in sites]
    matrix = identity = _identity(grid, copies[sites[0]], copies[removals[0].kept])
    index = None
    for site, removal in zip(sites, removals, strict=True):
        place, kept = copies[site], copies[removal.kept]
        if removal.of_whole:
            matrix, index = identity, None

        def then(target: Any, *args: Any, place: fx.Node = place) -> fx.Node:
            with place.graph.inserting_before(place):
                return call(place.graph, target, *args, like=place)

        if removal.weights is None:
            matrix = then(gtp_fx.take_tokens.default, matrix, kept, 0, 1, 0, 0)
        else:
            own = None if removal.own is None else copies[removal.own]
            received = (copies[removal.weights], kept, copies[removal.propagated])
            matrix = then(gtp_fx.propagate.default, matrix, *received, removal.alpha, 0, own)
        index = kept if index is None else then(aten.gather.default, index, 1, kept)
    assert index is not None
    return matrix, index


def _identity(grid: Grid, first: fx.Node, like: fx.Node) -> fx.Node:
    """[B, G, G] before the node `first`, of as many images as `like` has."""
    graph = first.graph
    with graph.inserting_before(first):
        identity = call(graph, aten.eye.default, math.prod(grid.shape), like=first)
        identity.kwargs = {"device": first.meta["val"].device}
        images = call(graph, aten.sym_size.int, like, 0, like=first)
        alone = call(graph, aten.unsqueeze.default, identity, 0, like=first)
        return call(graph, aten.expand.default, alone, [images, -1, -1], like=first)
