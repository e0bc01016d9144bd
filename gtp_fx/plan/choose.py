"""schedule="auto": the schedule of least damage within the budget, by a prior or by what unlabelled images say."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import fx

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
"""What makes the graph that carries a plan out, to be run at once and thrown away; `gm` stays as it is."""
Solve = Callable[[Damage], Counts]
"""The schedule of least damage within the budget, as its currency asks: `least_damage` or `least_damage_few_sites`. Raises OverBudget."""


@dataclass(frozen=True)
class Choice:
    """counts: tokens that leave at each site. strategy: how; another one than was asked for only where calibration may choose
    it. origin: what the choice rests on, for the report. moved: how far outputs moved with it, None where nobody looked."""

    counts: Counts
    strategy: Strategy
    origin: str
    moved: float | None = None


def by_prior(model: CostModel, strategy: Strategy, solve: Solve) -> Choice:
    """Without data. Raises OverBudget."""
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
    """From `calibration`, bound to the model's calls. gm: behind the exact passes, with its parameters. Raises OverBudget."""
    model = model_of(strategy)
    guessed = solve(prior_damage(found.sites))  # before measuring, since it tells whether the budget can be met
    judge = Judge.of(gm, calibration.images)

    def judged(counts: Counts, how: Strategy) -> float:
        return judge(apply_plan(gm, Plan.of(found.sites, counts, shapes, how)))

    with progress_bar(shown=calibration.progress) as show:
        damage = measured_damage(gm, found.sites, shapes, strategy, calibration, judged, show)
        first = list(dict.fromkeys([solve(damage), guessed, *_lines(model, limit)]))
        search = Search(judged, strategy, len(first) + calibration.refine, show)
        for counts in first:
            search.try_out(counts)
        search.weigh_anew(damage, solve, calibration.refine)

        def affordable(how: Strategy) -> list[Strategy]:
            return [v for v in _variants(how, found, calibration) if model_of(v).cost(search.best) <= limit]

        varied = search.vary_strategy(affordable)
    looked = f", the best of {len(search.seen)} schedules" + (f" and {varied + 1} strategies" if varied else "")
    origin = f"{damage.origin}{looked}: divergence {search.least:.3g}"
    return Choice(search.best, search.strategy, origin, search.least)


def _lines(model: CostModel, limit: float) -> Iterator[Counts]:
    """The paper's ways to spend the budget, of those that reach so far."""
    for line in SCHEDULE_FAMILIES.values():
        with contextlib.suppress(OverBudget):
            yield mildest_within(model, limit, line)


def _variants(strategy: Strategy, found: Candidates, calibration: Calibration) -> list[Strategy]:
    """The strategy's neighbours that can work on this model, where calibration may choose among them."""
    if not calibration.strategy:
        return []
    axes = [(site.axis, site.branch is not None) for site in found.sites]
    return [v for v in strategy.variants() if not any(v.refuse(axis, skips) for axis, skips in axes)]
