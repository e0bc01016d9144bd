"""Seconds that work takes on a target: a roofline with an efficiency curve for each kind of work.

products, convolutions   FLOPs over the dense rate, whole tiles and whole waves of tiles, or traffic over bandwidth: the larger
attention                the same, in tiles of queries and keys
everything else          traffic over bandwidth, or FLOPs over the dense rate: the larger
and each kernel          what launching it costs
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx

from gtp_fx.analysis.branches import Branch
from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.plan.cost.chains import CostModel, Numbers, cost_model
from gtp_fx.plan.cost.formulas import find
from gtp_fx.plan.cost.fusion import fused_groups
from gtp_fx.plan.cost.terms import graph_terms, group_work, node_work, terms_of
from gtp_fx.plan.site import Site
from gtp_fx.strategies.protocol import Strategy
from gtp_fx.targets.target import Target, Tile
from gtp_fx.targets.work import DENSE, Work
from gtp_fx.types.axes import whole_count
from gtp_fx.types.infer import SiteTyping


def seconds(work: Work, target: Target) -> Any:
    """Of one kernel; an array where the work's amounts are."""
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
    """By how much whole tiles, and whole waves of them over the units, are more than the work itself."""
    if work.kind == "attention":
        queries, keys = target.attention_tile
        return _whole(work.rows, queries) * _whole(work.tokens, keys)
    if not target.tiles:
        return 1.0
    return np.minimum.reduce([_in_tiles(work, tile, target.units) for tile in target.tiles])


def _in_tiles(work: Work, tile: Tile, units: int) -> Any:
    """The last wave takes as long as a full one, however few tiles it has."""
    tiles = work.batch * _up(work.rows, tile.rows) * _up(work.columns, tile.columns)
    made = _up(tiles, units) * units * tile.rows * tile.columns
    return made / (np.maximum(work.batch * work.rows * work.columns, 1) * tile.share)  # of no rows nothing is made


def _whole(amount: Any, tile: int) -> Any:
    """By how much whole tiles are more; of nothing, nothing."""
    return _up(amount, tile) * tile / np.maximum(amount, 1)


def _up(amount: Any, tile: int) -> Any:
    return np.ceil(np.asarray(amount) / tile)


def total_seconds(works: list[Work], target: Target) -> Any:
    return sum(seconds(work, target) for work in works)


def graph_seconds(graph: fx.Graph, target: Target, batch: int) -> float:
    """A graph as it stands, all its tokens in place, `batch` images a run where the batch is symbolic."""
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
    """Seconds of every schedule. original: of what ratios are taken of. branches: that tokens may skip, by block."""
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
    """For the block of each site where tokens skip a branch: what is spent more, by tokens kept, [tokens + 1]."""
    if not branches:
        return {}
    whole = typed_graph(graph).whole
    groups = list(fused_groups(whole))
    changes = {}
    for site in sites:
        if site.branch is not None:
            branch = branches[site.block]
            inside = set(branch.inside)
            nodes = [node for node in inside if find(node.target) is not None]
            works = [node_work(node, whole, whole_count, batch) for node in nodes]
            works += [
                group_work(group, whole, whole_count, batch) for group in groups if inside.issuperset(group.nodes)
            ]
            changes[site.block] = _branch_change(site, branch, works, strategy, target, batch)
    return changes


def _branch_change(
    site: Site, branch: Branch, works: list[Work], strategy: Strategy, target: Target, batch: int
) -> Numbers:
    """[tokens + 1]: what is spent more when so many tokens of each window are kept; 0 where all are. works: the branch's, whole."""
    assert site.branch is not None
    tokens, windows = branch.tokens, branch.windows * site.branch.images * batch
    kept = np.arange(tokens + 1)
    share = kept / tokens
    spent: Any = 0.0
    for work in works:
        rows = np.maximum(work.rows * share, 1)
        fewer = replace(work, flops=work.flops * share, bytes=work.bytes * share, rows=rows)
        spent = spent + seconds(fewer, target) - seconds(work, target)
    size = getattr(torch, site.dtype).itemsize
    values = windows * tokens * site.channels * size
    keys = math.prod(branch.cells) or tokens
    more = [
        *strategy.scoring_works(site.heads, tokens, keys, windows, site.dtype),
        Work("sort", bytes=windows * tokens * size),
        Work("stream", bytes=windows * (tokens - kept) * kept * size * 3, launches=2),
        Work("gather", 2 * windows * (tokens - kept) * kept * site.channels, values * (2 + 2 * share), launches=3),
    ]
    changed = spent + sum(seconds(work, target) for work in more)
    return np.where(kept == tokens, 0.0, changed)
