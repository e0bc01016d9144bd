"""schedule="auto": the schedule of least damage within the budget, by a prior or measured on unlabelled images."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from gtp_fx.analysis.placement import why_unfit
from gtp_fx.options.calibration import Calibration
from gtp_fx.options.progress import progress_bar
from gtp_fx.options.schedule import BlockShape
from gtp_fx.plan.cost.chains import CostModel
from gtp_fx.plan.damage.judge import Judge
from gtp_fx.plan.damage.prior import prior_damage
from gtp_fx.plan.damage.refinement import Counts, Search
from gtp_fx.plan.damage.sensitivity import measured_damage
from gtp_fx.plan.damage.tables import Damage
from gtp_fx.plan.find_sites import Candidates
from gtp_fx.plan.plan import Plan
from gtp_fx.plan.shortest_path import OverBudget
from gtp_fx.plan.uniform import SCHEDULE_FAMILIES, mildest_within
from gtp_fx.strategies import Strategy

ModelOf = Callable[[Strategy], CostModel]
ApplyPlan = Callable[[fx.GraphModule, Plan], fx.GraphModule]
"""Return a new graph that applies a plan, for one evaluation; the graph passed in is unchanged."""
Solve = Callable[[Damage], Counts]
"""Return the schedule of least damage within the budget, one count per site; raises OverBudget.

One of `least_damage`, `least_damage_few_sites` and `fastest_alike`, according to the budget and the target.
"""


@dataclass(frozen=True)
class Choice:
    """A schedule that was chosen, and why.

    counts: tokens removed at each site.
    strategy: the strategy to remove them by; it differs from the requested one only where calibration may vary it.
    origin: what the choice rests on, for the report.
    moved: divergence of the outputs under this choice; None where it was not measured.
    """

    counts: Counts
    strategy: Strategy
    origin: str
    moved: float | None = None


def by_prior(model: CostModel, strategy: Strategy, solve: Solve) -> Choice:
    """Choose without data, by the prior. Raises OverBudget."""
    damage = prior_damage(model.sites)
    return Choice(solve(damage), strategy, damage.origin)


def by_calibration(
    gm: fx.GraphModule,
    found: Candidates,
    shapes: Sequence[BlockShape],
    model_of: ModelOf,
    strategy: Strategy,
    limit: float,
    calibration: Calibration,
    solve: Solve,
    apply_plan: ApplyPlan,
) -> Choice:
    """Choose by the outputs of `gm` on calibration images.

    gm: the graph after the exact passes, with its parameters.
    found, shapes: the candidate sites, and the shape of every attention block.
    model_of: returns the cost model under a strategy.
    limit: the budget, in the currency of that model.
    calibration: bound to the model's calls.

    Raises OverBudget.
    """
    model = model_of(strategy)
    # Solved first: it tells whether the budget can be met, before any time goes into measurements.
    guessed = solve(prior_damage(found.sites))
    judge = Judge.of(gm, calibration.images)

    def judged(counts: Counts, how: Strategy) -> float:
        return judge(apply_plan(gm, Plan.of(found.sites, counts, shapes, how)))

    with progress_bar(shown=calibration.progress) as show:
        # Damage measured site by site proposes schedules; whole schedules are then judged by the outputs they give.
        damage = measured_damage(gm, found.sites, shapes, strategy, calibration, judged, show)
        first = list(dict.fromkeys([solve(damage), guessed, *_by_rule(model, limit)]))
        search = Search(judged, strategy, len(first) + calibration.refine, show)
        for counts in first:
            search.try_out(counts)
        search.weigh_anew(damage, solve, calibration.refine)

        # Variants are tried on the best schedule alone, and have to be within the budget there.
        def affordable(how: Strategy) -> list[Strategy]:
            return [v for v in _variants(how, found, calibration) if model_of(v).cost(search.best) <= limit]

        varied = search.vary_strategy(affordable)
    looked = f", the best of {len(search.seen)} schedules" + (f" and {varied + 1} strategies" if varied else "")
    origin = f"{damage.origin}{looked}: divergence {search.least:.3g}"
    return Choice(search.best, search.strategy, origin, search.least)


def _by_rule(model: CostModel, limit: float) -> Iterator[Counts]:
    """Yield the schedule of every rule ("uniform", "even") that can meet the budget."""
    for family in SCHEDULE_FAMILIES.values():
        with contextlib.suppress(OverBudget):
            yield mildest_within(model, limit, family)


def _variants(strategy: Strategy, found: Candidates, calibration: Calibration) -> list[Strategy]:
    """Return the variants of `strategy` that work at the same blocks; none where calibration may not vary it."""
    if not calibration.strategy:
        return []

    def fits(how: Strategy) -> list[bool]:
        return [not why_unfit(block, how) for block in found.placed]

    # One that also fit a block that is left out would be carried out on other sites than were priced.
    return [variant for variant in strategy.variants() if fits(variant) == fits(strategy)]
