"""Forecasts from plans: each term of the cost model, by block, with every token and with those that the plan keeps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from gtp_fx.analysis.typed_graph import TypedGraph, typed_graph
from gtp_fx.options.options import Options
from gtp_fx.plan.cost.chains import counts_after
from gtp_fx.plan.cost.closed_form import flops_of
from gtp_fx.plan.cost.seconds import branch_seconds, graph_seconds, total_seconds
from gtp_fx.plan.cost.site_terms import terms_of
from gtp_fx.plan.cost.terms import Term
from gtp_fx.plan.find_sites import Candidates, no_sites
from gtp_fx.plan.make_plan import Planned
from gtp_fx.plan.problem import Original
from gtp_fx.plan.site import BranchCost, RestCost
from gtp_fx.report.forecast import BlockForecast, Cost, Forecast
from gtp_fx.strategies import Strategy
from gtp_fx.types.axes import whole_count


def forecast(gm: fx.GraphModule, original: Original, planned: Planned, options: Options) -> Forecast:
    """Return the forecast of a plan for `gm`, whose exact passes have run.

    original: the graph before the exact passes.
    planned: the plan, with the sites it was made from.
    """
    typed, target, batch = typed_graph(gm.graph), options.target, options.batch
    strategy = planned.plan.strategy
    blocks = typed.blocks
    found = planned.found or no_sites(typed)
    counts = [planned.plan.schedule.removed[site.block] for site in found.sites]
    owner = _owners(typed)
    flops = _by_block(found, counts, owner, strategy, flops_of, 1)
    weigh = lambda works: total_seconds(works, target)  # noqa: E731
    seconds = _by_block(found, counts, owner, strategy, weigh, batch, target.has_kernels)
    skipped = branch_seconds(typed.graph, found.sites, strategy, target, batch, found.branches)
    # Branches have no terms: what their skipped tokens save is added to the plan's side of their block.
    for site, count in zip(found.sites, counts, strict=True):
        if site.branch is not None:
            flops[site.block][1] += site.branch.change(count)
            seconds[site.block][1] += skipped[site.block][site.branch.tokens - count]
    # Walk the blocks in order and count down the tokens that remain in each stream.
    rows = []
    remaining = {site.stream: site.whole for site in found.sites}
    by_block = {site.block: (site, count) for site, count in zip(found.sites, counts, strict=True)}
    for number in range(-1, len(blocks)):
        before, after = (Cost(int(flops[number][i]), float(seconds[number][i])) for i in (0, 1))
        if number < 0:
            rows.append(BlockForecast(number, "before the blocks", 0, 0, 0, before, after))
            continue
        axis = blocks[number].axis
        tokens, count, windows, patches = remaining.get(axis.domain.grid, axis.domain.whole_count), 0, 0, 0
        if number in by_block:
            site, count = by_block[number]
            tokens = remaining[site.stream]
            windows = site.branch.windows if isinstance(site.branch, BranchCost) else 0
            patches = site.branch.patches if isinstance(site.branch, RestCost) else 0
            remaining[site.stream] -= count
        rows.append(BlockForecast(number, blocks[number].layer, tokens, count, windows, before, after, patches))
    return Forecast(
        budget=options.budget,
        target=target.name,
        measured=target.measured,
        batch=batch,
        strategy=str(strategy),
        strategy_name=strategy.name,
        damage_from=planned.damage_from,
        schedule=planned.plan.schedule,
        original=Cost(original.flops, graph_seconds(original.graph, target, batch)),
        blocks=tuple(rows),
        refusals=planned.refusals,
    )


def _by_block(
    found: Candidates,
    counts: Sequence[int],
    owner: Callable[[Term], int],
    strategy: Strategy,
    weigh: Callable[[Any], Any],
    batch: int,
    kernels: bool = False,
) -> dict[int, list[Any]]:
    """Return, by block, [cost with every token, cost with the plan]; branches aren't counted.

    counts: tokens removed at each site.
    owner: the block of a term that belongs to no site.
    weigh: turns a term's works into a cost.
    kernels: whether the work is that of the Triton kernels.
    """
    after = counts_after(found.sites, counts)
    spent: dict[int, list[Any]] = defaultdict(lambda: [0, 0])
    for term in terms_of(found.typing, found.sites, strategy, batch, kernels):
        row = spent[owner(term) if term.site is None else found.sites[term.site].block]
        # A site's own work exists only with the plan: where it removes something and, for what a stream computes once,
        # at the first site that does.
        if term.site is None:
            row[0] += weigh(term.works(whole_count))
        elif not counts[term.site] or (
            term.first and after(found.sites[term.site].domain) < found.sites[term.site].whole
        ):
            continue
        row[1] += weigh(term.works(after))
    return spent


def _owners(typed: TypedGraph) -> Callable[[Term], int]:
    """Return a function from a term to its block: the last one whose stream exists before the term; -1 for none."""
    order = {node: position for position, node in enumerate(typed.graph.nodes)}
    starts = [order[block.stream if block.stream is not None else block.attention] for block in typed.blocks]

    def owner(term: Term) -> int:
        position = order[term.node] if term.node is not None else -1
        return sum(start < position for start in starts) - 1

    return owner
