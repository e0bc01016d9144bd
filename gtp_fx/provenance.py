"""Which original patches each remaining token stands for, and by how much.

Propagation is linear in the tokens: at a site x_kept + alpha * Â[kept, propagated] x_propagated. Carried out on the identity
instead of features, it gives a matrix: entry (k, g) is the weight of patch g in token k. Row sums are the token scales.
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
        found = []
        for grid, sites in streams.items():
            state = sites[-1].meta[SITE][1]
            found += [_matrix(grid, [copies[site] for site in sites]), copies[state.index]]
        return found

    runner = returning(gm, results)

    def run(*args: Any, **kwargs: Any) -> tuple[Provenance, ...]:
        flat = runner(*args, **kwargs)
        return tuple(Provenance(grid.shape, flat[2 * i], flat[2 * i + 1]) for i, grid in enumerate(streams))

    return run


def _matrix(grid: Grid, sites: list[fx.Node]) -> fx.Node:
    """The sites' propagations, from the first to the last, of the identity."""
    first, patches = sites[0], math.prod(grid.shape)
    graph = first.graph
    with graph.inserting_before(first):
        device = first.meta["val"].device
        identity = call(graph, aten.eye.default, patches, like=first)
        identity.kwargs = {"device": device}
        images = call(graph, aten.sym_size.int, first.args[2], 0, like=first)
        matrix = call(
            graph,
            aten.expand.default,
            call(graph, aten.unsqueeze.default, identity, 0, like=first),
            [images, -1, -1],
            like=first,
        )
    for site in sites:
        assert site.target is gtp_fx.propagate.default
        _, weights, kept, propagated, alpha, _ = site.args
        with graph.inserting_before(site):
            matrix = call(graph, gtp_fx.propagate.default, matrix, weights, kept, propagated, alpha, 0, like=site)
    return matrix
