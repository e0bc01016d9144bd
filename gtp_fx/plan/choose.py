"""schedule="auto" under one strategy: the schedule of least damage within the budget, by a prior or measured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from gtp_fx.options.calibration import Calibration
from gtp_fx.options.progress import Progress
from gtp_fx.plan.damage.judge import Judge
from gtp_fx.plan.damage.prior import prior_damage
from gtp_fx.plan.damage.refinement import Counts, Search
from gtp_fx.plan.damage.sensitivity import measured_damage
from gtp_fx.plan.problem import Problem
from gtp_fx.plan.shortest_path import OverBudget
from gtp_fx.plan.uniform import SCHEDULE_FAMILIES


@dataclass(frozen=True)
class Contender:
    """One strategy on one schedule, of those that strategy="auto" chose from.

    name: the strategy's name.
    strategy: the strategy in words.
    schedule: how its schedule came about: "auto" by the prior, "even", "calibrated" or "refined".
    images: calibration images that it was judged on. Only those judged on all of them could be chosen.
    moved: divergence of the outputs on these; None where it was left out.
    refused: why it was left out; empty where it wasn't.
    """

    name: str
    strategy: str
    schedule: str
    images: int
    moved: float | None
    refused: str = ""


@dataclass(frozen=True)
class Choice:
    """A schedule that was chosen, and why.

    counts: tokens removed at each of the problem's sites.
    problem: with the strategy to remove them by; another than was asked for only where that was "auto".
    origin: what the choice rests on, for the report; empty where there was none.
    moved: divergence of the outputs under this choice; None where it was not measured.
    contenders: what was compared, the best first; empty where nothing was.
    """

    counts: Counts
    problem: Problem
    origin: str = ""
    moved: float | None = None
    contenders: tuple[Contender, ...] = ()


def by_prior(problem: Problem) -> Choice:
    """Choose without data, by the prior. Raises OverBudget."""
    damage = prior_damage(problem.found.sites)
    return Choice(problem.solve(damage), problem, damage.origin)


def by_calibration(problem: Problem, judge: Judge, calibration: Calibration, progress: Progress) -> Choice:
    """Choose by the outputs on calibration images. Raises OverBudget."""
    # Solved first: it tells whether the budget can be met, before any time goes into measurements.
    guessed = problem.solve(prior_damage(problem.found.sites))
    search = Search(lambda counts: judge(problem.plan(counts)), progress=progress)
    # Damage measured site by site proposes schedules; whole schedules are then judged by the outputs they give.
    damage = measured_damage(problem.found.sites, calibration.points, search.judge, judge.images, progress)
    first = list(dict.fromkeys([problem.solve(damage), guessed, *_by_rules(problem)]))
    search.total = len(first) + calibration.refine
    for counts in first:
        search.try_out(counts)
    search.weigh_anew(damage, problem.solve, calibration.refine)
    origin = f"{damage.origin}, the best of {len(search.seen)} schedules: divergence {search.least:.3g}"
    return Choice(search.best, problem, origin, search.least)


def _by_rules(problem: Problem) -> Iterator[Counts]:
    """Yield the schedule of every rule ("uniform", "even") that can meet the budget."""
    for rule in SCHEDULE_FAMILIES:
        with contextlib.suppress(OverBudget):
            yield problem.by_rule(rule)
