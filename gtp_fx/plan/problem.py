"""The problem that a schedule solves under one strategy: its sites, what removing tokens costs there, and the limit."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import fx

from gtp_fx.analysis.typed_graph import TypedGraph
from gtp_fx.options.options import Options
from gtp_fx.options.schedule import BlockShape
from gtp_fx.plan.cost.chains import CostModel
from gtp_fx.plan.cost.closed_form import flops_model
from gtp_fx.plan.cost.seconds import graph_seconds, seconds_model
from gtp_fx.plan.damage.refinement import Counts
from gtp_fx.plan.damage.tables import Damage
from gtp_fx.plan.fastest import fastest_alike
from gtp_fx.plan.find_sites import Candidates, block_shape, find_sites
from gtp_fx.plan.least_damage import least_damage, least_damage_few_sites
from gtp_fx.plan.plan import Plan, removed_by_stream
from gtp_fx.plan.uniform import SCHEDULE_FAMILIES, mildest_within
from gtp_fx.strategies import Strategy


@dataclass(frozen=True)
class Original:
    """The original model, which ratios refer to.

    graph: its graph, in the operators that `normalise` leaves.
    flops: per image.
    """

    graph: fx.Graph
    flops: int


@dataclass(frozen=True, eq=False)
class Problem:
    """One strategy's sites and prices, and the limit that a schedule has to keep.

    strategy: settled as far as no schedule matters to it.
    found: the candidate sites.
    shapes: the shape of every attention block.
    flops: prices schedules in FLOPs.
    model: prices them in the budget's currency; `flops` itself where that is FLOPs.
    limit: the most a schedule may cost in that currency; infinite where there is no budget.
    solve: returns the schedule of least damage within the limit, one count per site; raises OverBudget.
    """

    strategy: Strategy
    found: Candidates
    shapes: tuple[BlockShape, ...]
    flops: CostModel
    model: CostModel
    limit: float
    solve: Callable[[Damage], Counts]

    @classmethod
    def of(cls, typed: TypedGraph, strategy: Strategy, options: Options, original: Original) -> Problem:
        """Find the sites of `strategy` and price its schedules.

        Raises UnsupportedModelError where it can't remove tokens from this model.
        """
        found = find_sites(typed, strategy)
        strategy = _settled_early(strategy, found)
        flops = flops_model(found.typing, found.sites, strategy, original.flops)

        @functools.cache  # calibration solves many times
        def timed() -> CostModel:
            target, batch = options.target, options.batch
            before = graph_seconds(original.graph, target, batch)
            return seconds_model(found.typing, found.sites, strategy, target, batch, before, found.branches)

        in_time = options.latency_budget is not None
        model = timed() if in_time else flops
        limit = options.limit(model.original) if in_time or options.flops_budget is not None else math.inf

        # The currency of the budget and the target decide what "best" means beside damage: see each function.
        def solve(damage: Damage) -> Counts:
            if in_time:
                return least_damage(model, damage, limit)
            if options.target.has_kernels:
                return fastest_alike(model, timed(), damage, limit)
            return least_damage_few_sites(model, damage, limit)

        return cls(strategy, found, tuple(map(block_shape, typed.blocks)), flops, model, limit, solve)

    def by_rule(self, rule: str) -> Counts:
        """Return the gentlest schedule of a rule ("even", "uniform") within the limit. Raises OverBudget."""
        return mildest_within(self.model, self.limit, SCHEDULE_FAMILIES[rule])

    def plan(self, counts: Sequence[int]) -> Plan:
        """Return the plan that removes `counts[i]` tokens at site i."""
        return Plan.of(self.found.sites, counts, self.shapes, self.strategy)


def _settled_early(strategy: Strategy, found: Candidates) -> Strategy:
    """Settle what holds under every schedule before anything is priced.

    Where token scales would be too small to matter even if every site removed all but one token, they are never read.
    """
    worst = strategy.settled(removed_by_stream(found.sites, [site.whole - 1 for site in found.sites]))
    return strategy if worst.reads_scales else worst
