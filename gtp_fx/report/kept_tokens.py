"""Kept tokens: where the tokens of an output stand on the patch grid, and which patches each of them stands for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.ops import aten, gtp_fx  # type: ignore[import-not-found]
from torch.utils import _pytree as pytree

from gtp_fx.analysis.returned_tokens import ReturnedTokens
from gtp_fx.graph.edit import call, returning
from gtp_fx.ops.token_graph import place_numbers
from gtp_fx.report.provenance import SiteRecord, calls_of
from gtp_fx.types.axes import TokenAxis
from gtp_fx.types.places import home_of


@dataclass(frozen=True, eq=False)
class KeptTokens:
    """The tokens of one output, [B, prefix + K + suffix, C].

    grid: sides of the grid that its patches stand on; a row where they have no places.
    positions: [B, K], each patch token's place on the grid (row-major), in the output's order.
    stand_ins: [B, G], for each place on the grid the number (0 to K - 1) of the token that stands for its patch: that
        patch's own, or the one that received most of it when it was removed. -1 where the stream never had the patch.
    prefix, suffix: the output's tokens before and after the patch tokens (CLS, registers).
    """

    grid: tuple[int, ...]
    positions: Tensor
    stand_ins: Tensor
    prefix: int = 0
    suffix: int = 0

    def __repr__(self) -> str:
        """Return shapes and counts, without the tensors' contents."""
        images, kept = self.positions.shape
        around = f", {self.prefix} before and {self.suffix} after them" if self.prefix or self.suffix else ""
        grid = " x ".join(map(str, self.grid))
        return f"{type(self).__name__}({images} images, each {kept} of {grid} patches{around})"


Run = Callable[..., Any]
"""A function of a model's inputs."""


def also_returning_kept(
    gm: fx.GraphModule, records: Sequence[SiteRecord], returned: Sequence[ReturnedTokens]
) -> tuple[fx.GraphModule, Callable[[Run], Run]]:
    """Return a graph that also returns what `KeptTokens` are made of, and what makes that readable.

    The second maps whatever runs that graph (compiled or not) to a function of the model's inputs that returns the
    model's output, the same structure with `KeptTokens` in place of the outputs that have fewer tokens, else None, and
    those in a flat list.

    records: the sites of `gm`. returned: its outputs that run over tokens.
    """
    shorter = [kept for kept in returned if kept.axis.domain.level]
    domains = list(dict.fromkeys(kept.axis.domain for kept in shorter))
    sites = {domain: [r for r in records if r.grid == domain.grid][: domain.level] for domain in domains}
    leaves: list[Any] = pytree.tree_leaves(gm.graph.output_node().args[0])

    def results(copies: dict[fx.Node, fx.Node]) -> list[fx.Node]:
        calls = [copies[node] for node in calls_of(gm.graph)]
        outputs = [copies[leaf] for leaf in leaves if isinstance(leaf, fx.Node)]
        return [*outputs, *(node for domain in domains for node in _followed(sites[domain], calls))]

    graph = returning(gm, results)
    graph.meta.update(gm.meta)

    def readable(run: Run) -> Run:
        def run_both(*args: Any, **kwargs: Any) -> tuple[Any, Any, list[Any]]:
            flat = iter(run(*args, **kwargs))
            outputs = [next(flat) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
            found = {domain: _on_the_grid(sites[domain], flat) for domain in domains}
            kept: list[Any] = [None] * len(leaves)
            for one in shorter:
                kept[one.number] = _of_output(one.axis, *found[one.axis.domain])
            return gm.graph.process_outputs(outputs), gm.graph.process_outputs(kept), kept

        return run_both

    return graph, readable


def _followed(sites: Sequence[SiteRecord], calls: Sequence[fx.Node]) -> Iterator[fx.Node]:
    """Insert, after the last of a stream's sites, what follows its tokens through all of them.

    Yield the nodes of the tokens' indices, of `stand_ins` by the stream's own order, and of its places where those
    aren't in the grid's order.
    """
    index: fx.Node | None = None
    stands: fx.Node | None = None
    last = calls[sites[-1].place]
    graph, place = last.graph, last.next

    def insert(target: Any, *args: Any) -> fx.Node:
        with graph.inserting_before(place):
            return call(graph, target, *args, like=last)

    for site in sites:
        assert not site.of_whole, "a strategy that restores tokens returns all of them"
        kept = calls[site.kept]
        weights = None if site.weights is None else calls[site.weights]
        removed = None if site.removed is None else calls[site.removed]
        places = () if site.places is None else (calls[site.places],)
        sides = home_of(site.grid).sides
        at_site = insert(gtp_fx.stand_ins.default, weights, kept, removed, index, sides, *places)
        stands = at_site if stands is None else insert(aten.gather.default, at_site, 1, stands)
        index = kept if index is None else _gathered(index, kept) or insert(aten.gather.default, index, 1, kept)
    assert index is not None and stands is not None
    yield index
    yield stands
    if sites[0].places is not None:
        yield calls[sites[0].places]


def _gathered(index: fx.Node, kept: fx.Node) -> fx.Node | None:
    """Return the node that gathers the kept of some indices, where the strategy has inserted one: kernels know it."""
    made = (user for user in kept.users if user.target is aten.gather.default and user.args == (index, 1, kept))
    return next(made, None)


def _on_the_grid(sites: Sequence[SiteRecord], flat: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """Return positions and stand-ins on the grid that a stream's patches are from. flat: what `_followed` returned."""
    index_BK, stands_BG = next(flat), next(flat)
    if sites[0].places is None:
        return index_BK, stands_BG
    home = home_of(sites[0].grid)
    number_BG = place_numbers(next(flat), home.sides).expand(len(index_BK), -1)
    nowhere = torch.full((len(index_BK), math.prod(home.shape)), -1, dtype=stands_BG.dtype, device=stands_BG.device)
    return number_BG.gather(1, index_BK), nowhere.scatter(1, number_BG, stands_BG)


def _of_output(axis: TokenAxis, positions_BK: Tensor, stands_BG: Tensor) -> KeptTokens:
    return KeptTokens(home_of(axis.domain.grid).shape, positions_BK, stands_BG, axis.prefix, axis.suffix)
