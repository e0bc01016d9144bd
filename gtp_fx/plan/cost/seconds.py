"""Seconds that work takes on a target: a roofline with an efficiency curve for each kind of work.

A kernel takes the larger of compute time and memory time, plus the time of its launch:

kind                     compute                                                        memory
products, convolutions   FLOPs in whole tiles and whole waves of tiles, / dense rate    traffic / bandwidth
attention                FLOPs in whole tiles of queries and keys, / dense rate         traffic / bandwidth
everything else          FLOPs / dense rate                                             traffic / bandwidth
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx

from gtp_fx.analysis.branches import Branch
from gtp_fx.analysis.resting import Rest
from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.plan.cost.chains import CostModel, Numbers, cost_model
from gtp_fx.plan.cost.formulas import formula_of
from gtp_fx.plan.cost.fusion import fused_groups
from gtp_fx.plan.cost.rest_seconds import RestWork, rest_change
from gtp_fx.plan.cost.site_terms import terms_of
from gtp_fx.plan.cost.terms import graph_terms, group_work, node_work
from gtp_fx.plan.site import BranchCost, RestCost, Site
from gtp_fx.strategies.protocol import Strategy
from gtp_fx.targets.target import Target, Tile
from gtp_fx.targets.work import DENSE, Work
from gtp_fx.types.axes import whole_count
from gtp_fx.types.infer import SiteTyping


def seconds(work: Work, target: Target) -> Any:
    """Return the seconds of one work: a number, or an array where the work's amounts are arrays."""
    rate = target.rate(work.dtype)
    if work.kind in DENSE:
        amount = work.tokens if work.kind == "attention" else work.flops
        padded = work.flops * _padding(work, target)
        compute = padded / (rate * target.curves[work.kind](amount))
        memory = work.bytes / (target.bandwidth * target.curves["stream"](work.bytes))
    else:
        compute = work.flops / rate
        memory = work.bytes / (target.bandwidth * target.curves[work.kind](work.bytes))
    return np.maximum(compute, memory) + work.launches * target.launch


def _padding(work: Work, target: Target) -> Any:
    """Return the factor by which whole tiles, and whole waves of them over the processor's units, exceed the work."""
    if work.kind == "attention":
        queries, keys = target.attention_tile
        return _whole(work.rows, queries) * _whole(work.tokens, keys)
    if not target.tiles:
        return 1.0
    return np.minimum.reduce([_in_tiles(work, tile, target.units) for tile in target.tiles])


def _in_tiles(work: Work, tile: Tile, units: int) -> Any:
    """Return that factor for one tile shape; the last wave takes as long as a full one, however few tiles it has."""
    tiles = work.batch * _up(work.rows, tile.rows) * _up(work.columns, tile.columns)
    made = _up(tiles, units) * units * tile.rows * tile.columns
    return made / (np.maximum(work.batch * work.rows * work.columns, 1) * tile.share)  # max: no rows, no division by 0


def _whole(amount: Any, tile: int) -> Any:
    """Return the factor by which whole tiles exceed `amount`; 0 where the amount is 0."""
    return _up(amount, tile) * tile / np.maximum(amount, 1)


def _up(amount: Any, tile: int) -> Any:
    """Return the number of tiles that hold `amount`."""
    return np.ceil(np.asarray(amount) / tile)


def total_seconds(works: list[Work], target: Target) -> Any:
    """Return the summed seconds of some works."""
    return sum(seconds(work, target) for work in works)


def graph_seconds(graph: fx.Graph, target: Target, batch: int) -> float:
    """Return the seconds of one run of a graph as it stands, with every token in place.

    batch: images of a run where the batch is symbolic.
    """
    terms = graph_terms(typed_graph(graph).whole, batch)
    return float(sum(total_seconds(term.works(whole_count), target) for term in terms))


def seconds_model(
    typing: SiteTyping,
    sites: tuple[Site, ...],
    strategy: Strategy,
    target: Target,
    batch: int,
    original: float,
    branches: Mapping[int, Branch],
) -> CostModel:
    """Return the seconds of every schedule over `sites`.

    typing: types of the graph with a site after each of `sites` at which tokens are removed.
    batch: images of a run where the batch is symbolic.
    original: seconds of the original graph, which ratios refer to.
    branches: the branches that tokens may skip, by block number.
    """
    skipped = branch_seconds(typing.graph, sites, strategy, target, batch, branches)
    terms = terms_of(typing, sites, strategy, batch, target.has_kernels)
    weigh = lambda works: total_seconds(works, target)  # noqa: E731
    return cost_model(sites, terms, weigh, lambda site: skipped[site.block], original, np.float64)


def branch_seconds(
    graph: fx.Graph,
    sites: Sequence[Site],
    strategy: Strategy,
    target: Target,
    batch: int,
    branches: Mapping[int, Branch],
) -> dict[int, Numbers]:
    """Return the change in seconds by the tokens kept, [tokens + 1], for each block at which tokens may skip a branch.

    Where whole windows may rest, it is by the windows that are awake, [windows + 1].

    batch: images of a run where the batch is symbolic. branches: by block number.
    """
    if not branches:
        return {}
    typed = typed_graph(graph)
    whole = typed.whole
    groups = list(fused_groups(whole))

    def works_of(inside: Collection[fx.Node]) -> dict[fx.Node, Work]:
        """Return the products of some nodes, and, by one of its nodes, each fused group that lies inside them."""
        works = {node: node_work(node, whole, whole_count, batch) for node in inside if formula_of(node) is not None}
        within = [group for group in groups if set(inside).issuperset(group.nodes)]
        return works | {group.nodes[0]: group_work(group, whole, whole_count, batch) for group in within}

    def weigh(work: Work) -> Any:
        return seconds(work, target)

    changes = {}
    rests = typed.rests if any(isinstance(site.branch, RestCost) for site in sites) else {}
    for site in sites:
        if isinstance(site.branch, RestCost):
            rest = rests[site.block]
            assert isinstance(rest, Rest)
            works = [RestWork.of(rest, node, work, strategy) for node, work in works_of(rest.inside).items()]
            changes[site.block] = rest_change(site.branch, works, site.dtype, strategy.rest_keys, batch, weigh)
        elif site.branch is not None:
            branch = branches[site.block]
            through = list(works_of(branch.inside).values())
            changes[site.block] = _branch_change(site, branch, through, strategy, target, batch)
    return changes


def _branch_change(
    site: Site, branch: Branch, works: list[Work], strategy: Strategy, target: Target, batch: int
) -> Numbers:
    """Return [tokens + 1] the change in seconds by the tokens kept in each window; 0 where all are.

    works: the branch's works with every token.
    """
    assert isinstance(site.branch, BranchCost)
    tokens, windows = branch.tokens, branch.windows * site.branch.images * batch
    kept = np.arange(tokens + 1)
    others = branch.others / branch.windows
    share = (kept + others) / (tokens + others)
    # The branch itself, over the tokens kept instead of all.
    spent: Any = 0.0
    for work in works:
        rows = np.maximum(work.rows * share, 1)
        fewer = replace(work, flops=work.flops * share, bytes=work.bytes * share, rows=rows)
        spent = spent + seconds(fewer, target) - seconds(work, target)
    # What is new: scoring and sorting the tokens, taking and returning rows, and the shares [skipped, kept].
    size = getattr(torch, site.dtype).itemsize
    values = windows * (tokens + others) * site.channels * size
    keys = math.prod(branch.cells) if branch.cells else branch.attended
    attentions = branch.attentions * site.branch.images * batch
    ranking = strategy.scoring_works(site.heads, branch.attended, keys, attentions, site.dtype)
    if site.branch.by_activity:  # read for the windows' means, and for how far tokens are from these
        ranking = [Work("stream", bytes=2 * values, launches=2)]
    added = [
        *ranking,
        Work("sort", bytes=windows * tokens * size),
        Work("gather", bytes=values * (2 + 2 * share), launches=3),
    ]
    if strategy.recovers_branches:
        edges = windows * (tokens - kept) * kept
        added += [
            Work("stream", bytes=edges * size * 3, launches=2),
            Work("gather", 2 * edges * site.branch.recovered, launches=0),
        ]
    elif strategy.branch_mean:  # what the branch has made is read once more
        added.append(Work("stream", bytes=values * share))
    changed = spent + sum(seconds(work, target) for work in added)
    return np.where(kept == tokens, 0.0, changed)
