"""Provenance: which original patches each remaining token stands for, and by how much.

A site is linear in the tokens. With GTP it computes x_kept + alpha * Â[kept, removed] x_removed. Applied to the
identity matrix instead of features, it gives a matrix whose entry (k, g) is the weight of patch g in token k; with GTP
its row sums are the token scales. The matrix carries over whatever belongs to patches (labels, masks, distillation
targets): `matrix @ labels`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.ops import aten, gtp_fx  # type: ignore[import-not-found]
from torch.utils import _pytree as pytree

from gtp_fx.graph.edit import call, returning
from gtp_fx.ops.token_graph import place_numbers
from gtp_fx.passes.reduce.remove_tokens import SITE
from gtp_fx.strategies.sites import Removal
from gtp_fx.types.grids import Grid
from gtp_fx.types.places import home_of


@dataclass(frozen=True, eq=False)
class Provenance:
    """Origin of one stream's tokens after its last site.

    grid: sides of the grid that the stream's patches stand on; a row where they have no places.
    matrix: [B, K, G], weight of each of the grid's G patches (row-major) in each of the K remaining tokens.
    index: [B, K], the remaining tokens' places on the grid (row-major), in the stream's order.
    """

    grid: tuple[int, ...]
    matrix: Tensor
    index: Tensor

    def __repr__(self) -> str:
        """Return shapes and counts, without the tensors' contents."""
        images, kept, _ = self.matrix.shape
        grid = " x ".join(map(str, self.grid))
        return f"{type(self).__name__}({images} images, {kept} tokens that stand for {grid} patches)"


@dataclass(frozen=True)
class SiteRecord:
    """One site's nodes, as numbers of calls in their graph.

    Calls are counted from 0 (`calls_of`). The numbers stay valid when the graph is copied, saved and loaded.

    grid: the grid of the stream.
    place: the stream after the site.
    kept: [B, K], indices of the tokens that remain.
    removed: [B, P], indices of the tokens that are removed; None where the site passes nothing on.
    weights: [B, K, P], how much of each removed token each kept one receives; None where the site passes nothing on.
    own: [B, K], how much of itself each kept token keeps; None where that is all.
    alpha: factor of `weights`.
    of_whole: whether `kept` and `removed` index the whole grid instead of the tokens that the site had.
    places: [1 or B, G, R], where each patch of the whole stream is on the grid; None where they are in its order.
    """

    grid: Grid
    place: int
    kept: int
    removed: int | None
    weights: int | None
    own: int | None
    alpha: float
    of_whole: bool
    places: int | None = None


def record_sites(gm: fx.GraphModule) -> tuple[SiteRecord, ...]:
    """Return the sites of a graph that the passes have just rewritten, in graph order."""
    number = {node: i for i, node in enumerate(calls_of(gm.graph))}
    records = []
    for node in number:
        if SITE in node.meta:
            grid, state, places = node.meta[SITE]
            removal: Removal = state.removal
            removed, weights, own = None, removal.weights, removal.own
            if weights is not None:  # else nothing reads the removed tokens' indices, and the node may not exist
                removed = number[removal.removed]
            records.append(
                SiteRecord(
                    grid=grid,
                    place=number[node],
                    kept=number[removal.kept],
                    removed=removed,
                    weights=None if weights is None else number[weights],
                    own=None if own is None else number[own],
                    alpha=removal.alpha,
                    of_whole=removal.of_whole,
                    places=None if places is None else number[places],
                )
            )
    return tuple(records)


def provenance_runner(
    gm: fx.GraphModule, records: Sequence[SiteRecord], device: torch.device
) -> Callable[..., tuple[Provenance, ...]]:
    """Return a function of the model's inputs that gives one `Provenance` per stream of `gm` that loses tokens.

    records: the sites of `gm`, or of the graph that it is a copy of.
    device: the model's device.
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
    """Return a function of the model's inputs that gives the graph's outputs and the provenance, from one run.

    records, device: see `provenance_runner`.
    """
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
    """Group sites by the grid of their stream, in order."""
    streams: dict[Grid, list[SiteRecord]] = {}
    for record in records:
        streams.setdefault(record.grid, []).append(record)
    return streams


def _provenances(streams: dict[Grid, list[SiteRecord]], flat: Sequence[Tensor]) -> tuple[Provenance, ...]:
    """Pair streams with their results. flat: what `_carried` returned of each stream, in turn."""
    found, made = iter(flat), []
    for grid, sites in streams.items():
        home, matrix, index = home_of(grid), next(found), next(found)
        if sites[0].places is not None:  # from the stream's patches to those of the grid that they come from
            number_BG = place_numbers(next(found), home.sides).expand(len(matrix), -1)
            matrix = matrix @ F.one_hot(number_BG, math.prod(home.shape)).to(matrix.dtype)
            index = number_BG.gather(1, index)
        made.append(Provenance(home.shape, matrix, index))
    return tuple(made)


def calls_of(graph: fx.Graph) -> list[fx.Node]:
    """Return the graph's calls in order; `SiteRecord` refers to them by their position in this list."""
    return [node for node in graph.nodes if node.op == "call_function"]


def _carried(sites: list[SiteRecord], calls: list[fx.Node], device: torch.device) -> tuple[fx.Node, ...]:
    """Insert what a stream's sites do, applied to the identity.

    Return the nodes of the matrix, of the index, and of the places where the patches aren't in their grid's order.
    """
    patches = math.prod(sites[0].grid.shape)
    matrix = identity = _identity(patches, calls[sites[0].place], calls[sites[0].kept], device)
    index = None
    for site in sites:
        place, kept = calls[site.place], calls[site.kept]
        if site.of_whole:  # its indices are into the whole grid, so it doesn't build on earlier sites
            matrix, index = identity, None

        def insert(target: Any, *args: Any, place: fx.Node = place) -> fx.Node:
            with place.graph.inserting_before(place):
                return call(place.graph, target, *args, like=place)

        if site.weights is None:
            matrix = insert(gtp_fx.take_tokens.default, matrix, kept, 0, 1, 0, 0)
        else:
            own = None if site.own is None else calls[site.own]
            assert site.removed is not None
            received = (calls[site.weights], kept, calls[site.removed])
            matrix = insert(gtp_fx.propagate.default, matrix, *received, site.alpha, 0, own)
        index = kept if index is None else insert(aten.gather.default, index, 1, kept)
    assert index is not None
    places = sites[0].places
    return (matrix, index) if places is None else (matrix, index, calls[places])


def _identity(patches: int, first: fx.Node, like: fx.Node, device: torch.device) -> fx.Node:
    """Insert the identity matrix [B, G, G] before the node `first`. like: a node whose first dimension is B."""
    graph = first.graph
    with graph.inserting_before(first):
        identity = call(graph, aten.eye.default, patches, like=first)
        identity.kwargs = {"device": device}
        images = call(graph, aten.sym_size.int, like, 0, like=first)
        single = call(graph, aten.unsqueeze.default, identity, 0, like=first)
        return call(graph, aten.expand.default, single, [images, -1, -1], like=first)
