"""Which original patches each remaining token stands for, and by how much.

What a site does is linear in the tokens: with GTP x_kept + alpha * Â[kept, propagated] x_propagated. Carried out on the identity
instead of features, it gives a matrix: entry (k, g) is the weight of patch g in token k. With GTP row sums are the token scales.
With it, whatever belongs to patches (labels, masks, distillation targets) can be carried along: `matrix @ labels`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.ops import aten, gtp_fx  # type: ignore[import-not-found]
from torch.utils import _pytree as pytree

from gtp_fx.graph.edit import call, returning
from gtp_fx.passes.reduce.remove_tokens import SITE
from gtp_fx.strategies.protocol import Removal
from gtp_fx.types.axes import Grid


@dataclass(frozen=True, eq=False)
class Provenance:
    """Of one stream of tokens: patches of a grid (row-major), after the last site.

    matrix [B, K, G]: weight of each of the grid's G patches in each of the K tokens left. index [B, K]: where on the grid
    those tokens stood, ascending.
    """

    grid: tuple[int, ...]
    matrix: Tensor
    index: Tensor


@dataclass(frozen=True)
class SiteRecord:
    """What one site did to the stream of a grid, as numbers of calls in a graph, counted from 0: those stay what they are when a
    graph is copied, saved and loaded. place: the stream behind it. The rest as in `Removal`."""

    grid: Grid
    place: int
    kept: int
    propagated: int | None
    weights: int | None
    own: int | None
    alpha: float
    of_whole: bool


def record_sites(gm: fx.GraphModule) -> tuple[SiteRecord, ...]:
    """Of a graph that passes have just rewritten, in order."""
    number = {node: i for i, node in enumerate(calls_of(gm.graph))}
    records = []
    for node in number:
        if SITE in node.meta:
            grid, state = node.meta[SITE]
            removal: Removal = state.removal
            propagated, weights, own = None, removal.weights, removal.own
            if weights is not None:  # else nothing asks who left, and that may be gone from the graph
                propagated = number[removal.propagated]
            records.append(
                SiteRecord(
                    grid=grid,
                    place=number[node],
                    kept=number[removal.kept],
                    propagated=propagated,
                    weights=None if weights is None else number[weights],
                    own=None if own is None else number[own],
                    alpha=removal.alpha,
                    of_whole=removal.of_whole,
                )
            )
    return tuple(records)


def provenance_runner(
    gm: fx.GraphModule, records: Sequence[SiteRecord], device: torch.device
) -> Callable[..., tuple[Provenance, ...]]:
    """A function of the model's inputs: one `Provenance` for each stream of `gm` that tokens leave.

    records: of `gm`, or of the graph that it is a copy of. device: where the model is.
    """
    streams = _by_stream(records)

    def results(copies: dict[fx.Node, fx.Node]) -> list[fx.Node]:
        calls = [copies[node] for node in calls_of(gm.graph)]
        return [value for sites in streams.values() for value in _carried(sites, calls, device)]

    runner = returning(gm, results)

    def run(*args: Any, **kwargs: Any) -> tuple[Provenance, ...]:
        return _provenances(streams, runner(*args, **kwargs))

    return run


def output_and_provenance_runner(
    gm: fx.GraphModule, records: Sequence[SiteRecord], device: torch.device
) -> Callable[..., tuple[Any, tuple[Provenance, ...]]]:
    """The same, with what the graph returns, in one run."""
    streams = _by_stream(records)
    count = len(gm.graph.output_node().all_input_nodes)
    returned: list[Any] = pytree.tree_leaves(gm.graph.output_node().args[0])

    def results(copies: dict[fx.Node, fx.Node]) -> list[fx.Node]:
        calls = [copies[node] for node in calls_of(gm.graph)]
        outputs = [copies[node] for node in gm.graph.output_node().all_input_nodes]
        return [*outputs, *(value for sites in streams.values() for value in _carried(sites, calls, device))]

    runner = returning(gm, results)

    def run(*args: Any, **kwargs: Any) -> tuple[Any, tuple[Provenance, ...]]:
        flat = runner(*args, **kwargs)
        of_node = dict(zip(gm.graph.output_node().all_input_nodes, flat[:count], strict=True))
        outputs = [of_node.get(value, value) for value in returned]
        return gm.graph.process_outputs(outputs), _provenances(streams, flat[count:])

    return run


def _by_stream(records: Sequence[SiteRecord]) -> dict[Grid, list[SiteRecord]]:
    streams: dict[Grid, list[SiteRecord]] = {}
    for record in records:
        streams.setdefault(record.grid, []).append(record)
    return streams


def _provenances(streams: dict[Grid, list[SiteRecord]], flat: Sequence[Tensor]) -> tuple[Provenance, ...]:
    return tuple(Provenance(grid.shape, flat[2 * i], flat[2 * i + 1]) for i, grid in enumerate(streams))


def calls_of(graph: fx.Graph) -> list[fx.Node]:
    """By which `SiteRecord` numbers them."""
    return [node for node in graph.nodes if node.op == "call_function"]


def _carried(sites: list[SiteRecord], calls: list[fx.Node], device: torch.device) -> tuple[fx.Node, fx.Node]:
    """What the sites did to a stream, from the first to the last, done to the identity: the matrix, and the index."""
    patches = math.prod(sites[0].grid.shape)
    matrix = identity = _identity(patches, calls[sites[0].place], calls[sites[0].kept], device)
    index = None
    for site in sites:
        place, kept = calls[site.place], calls[site.kept]
        if site.of_whole:
            matrix, index = identity, None

        def then(target: Any, *args: Any, place: fx.Node = place) -> fx.Node:
            with place.graph.inserting_before(place):
                return call(place.graph, target, *args, like=place)

        if site.weights is None:
            matrix = then(gtp_fx.take_tokens.default, matrix, kept, 0, 1, 0, 0)
        else:
            own = None if site.own is None else calls[site.own]
            assert site.propagated is not None
            received = (calls[site.weights], kept, calls[site.propagated])
            matrix = then(gtp_fx.propagate.default, matrix, *received, site.alpha, 0, own)
        index = kept if index is None else then(aten.gather.default, index, 1, kept)
    assert index is not None
    return matrix, index


def _identity(patches: int, first: fx.Node, like: fx.Node, device: torch.device) -> fx.Node:
    """[B, G, G] before the node `first`, of as many images as `like` has."""
    graph = first.graph
    with graph.inserting_before(first):
        identity = call(graph, aten.eye.default, patches, like=first)
        identity.kwargs = {"device": device}
        images = call(graph, aten.sym_size.int, like, 0, like=first)
        alone = call(graph, aten.unsqueeze.default, identity, 0, like=first)
        return call(graph, aten.expand.default, alone, [images, -1, -1], like=first)
