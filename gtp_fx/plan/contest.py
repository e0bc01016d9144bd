"""strategy="auto": strategies, their variants and schedules compared on calibration images, by successive halving.

    round 1     every strategy and variant on two cheap schedules, by the prior and even, on the first 8 images
    rounds 2 …  the better half of what is left, on twice as many images, until all images are in
    tables      the best two strategies: damage measured block by block proposes schedules, which are refined
    variants    the best contender's variants, one field at a time, on its schedule

A judgment costs as much as running the model on its images, so that the first rounds cost as much each. What is judged
is bounded by counts, never by time: two runs choose alike. The one that moves the outputs least on all images is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from gtp_fx.errors import GtpError, OptionError, UnsupportedModelError
from gtp_fx.options.calibration import Calibration
from gtp_fx.options.progress import Progress
from gtp_fx.options.schedule import AUTO
from gtp_fx.plan.choose import Choice, Contender
from gtp_fx.plan.damage.judge import Judge
from gtp_fx.plan.damage.prior import prior_damage
from gtp_fx.plan.damage.refinement import Counts, Search
from gtp_fx.plan.damage.sensitivity import measured_damage
from gtp_fx.plan.plan import Plan
from gtp_fx.plan.problem import Problem
from gtp_fx.plan.shortest_path import OverBudget
from gtp_fx.strategies import Auto, Strategy

ProblemOf = Callable[[Strategy], Problem]
"""Returns the problem under a strategy. Raises UnsupportedModelError, or OptionError for a fault of the strategy."""

EVEN, CALIBRATED, REFINED = "even", "calibrated", "refined"
_CHEAP = (AUTO, EVEN)
"""Schedules that cost no judgment."""

_FINALISTS = 4
"""The fewest contenders that a round leaves."""
_CALIBRATED = 2
"""Strategies for which damage is measured block by block."""
_TABLE_IMAGES = 16
"""Images that it is measured on: as many judgments as blocks times `Calibration.points`, and they only propose."""
_REFINE = 8
"""The fewest schedules that are tried around the best of each of these strategies."""
_TURNS = 3
"""Rounds over the best contender's variants."""


_Key = tuple[Strategy, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class _Entry:
    """One strategy on one schedule. how: as `Contender.schedule`."""

    problem: Problem
    counts: Counts
    how: str

    @property
    def plan(self) -> Plan:
        return self.problem.plan(self.counts)

    @property
    def key(self) -> _Key:
        """Return what tells plans of one model apart."""
        return self.plan.strategy, self.plan.schedule.removed


@dataclass(eq=False)
class _Contest:
    """What was compared so far.

    judged: each entry with the number of images and the divergence on them, by its key, so that no plan takes part
        twice.
    refused: what was left out.
    """

    judge: Judge
    progress: Progress
    judged: dict[_Key, tuple[_Entry, int, float]] = field(default_factory=dict)
    refused: list[Contender] = field(default_factory=list)

    def try_out(self, entry: _Entry, images: int) -> float:
        """Return the divergence of an entry on some images, and record it."""
        moved = self.judge(entry.plan, images)
        known = self.judged.get(entry.key)
        self.judged[entry.key] = (entry if known is None else known[0], images, moved)
        return moved

    def refuse(self, strategy: Strategy, how: str, why: str) -> None:
        self.refused.append(Contender(strategy.name, str(strategy), how, 0, None, why))

    def ranked(self) -> list[tuple[_Entry, int, float]]:
        """Return what was judged: on more images first, then by divergence. Equal ones stay in order."""
        return sorted(self.judged.values(), key=lambda each: (-each[1], each[2]))

    def contenders(self) -> tuple[Contender, ...]:
        """Return a row for each contender, the best first and those left out last."""
        rows = []
        for entry, images, moved in self.ranked():
            strategy = entry.plan.strategy
            rows.append(Contender(strategy.name, str(strategy), entry.how, images, moved))
        return (*rows, *self.refused)


def by_contest(auto: Auto, problem_of: ProblemOf, judge: Judge, calibration: Calibration, progress: Progress) -> Choice:
    """Choose strategy, variant and schedule by the outputs on calibration images.

    Raises OverBudget where no strategy has a schedule within the budget, and what `problem_of` raises for the first of
    them where none can work on this model.
    """
    contest = _Contest(judge, progress)
    _halved(contest, list(_entries(auto, problem_of, contest)))
    for number, entry in enumerate(_best_of_each_strategy(contest)[:_CALIBRATED]):
        _refined(contest, entry, calibration, f"{number + 1} of {_CALIBRATED}")
    _varied(contest, problem_of)
    best, images, moved = contest.ranked()[0]
    origin = f"measurement on {images} images, the best of {len(contest.judged)} contenders: divergence {moved:.3g}"
    return Choice(best.counts, best.problem, origin, moved, contest.contenders())


def _entries(auto: Auto, problem_of: ProblemOf, contest: _Contest) -> Iterator[_Entry]:
    """Yield every strategy on every cheap schedule, each plan once; those that can't take part are refused by name."""
    seen: set[_Key] = set()
    first: GtpError | None = None
    over: OverBudget | None = None
    strategies = auto.contenders()
    for number, strategy in enumerate(strategies):
        contest.progress(f"pricing {strategy.name}", number, len(strategies))
        try:
            problem = problem_of(strategy)
        except (UnsupportedModelError, OptionError) as error:
            first = first or error
            contest.refuse(strategy, "", _reason(error))
            continue
        for how in _CHEAP:
            try:
                damage = prior_damage(problem.found.sites)
                entry = _Entry(problem, problem.solve(damage) if how == AUTO else problem.by_rule(how), how)
            except OverBudget as error:
                over = error if over is None or error.cost < over.cost else over
                share = error.cost / problem.model.original
                contest.refuse(strategy, how, f"can't keep the budget: the lowest ratio is {share:.3f}")
                continue
            if entry.key not in seen:
                seen.add(entry.key)
                yield entry
    if not seen:
        raise over or first or AssertionError("there is a first strategy")


def _halved(contest: _Contest, entries: Sequence[_Entry]) -> None:
    """Judge the entries in rounds, each on more images, and leave out the worse half of what is left."""
    alive = list(entries)
    rounds = contest.judge.rounds
    for number, images in enumerate(rounds, start=1):
        moved: dict[_Entry, float] = {}
        for entry in alive:
            label = f"round {number} of {len(rounds)}, {images} images: {entry.problem.strategy.name}"
            contest.progress(label, len(moved), len(alive))
            moved[entry] = contest.try_out(entry, images)
        alive = sorted(alive, key=lambda entry: moved[entry])[: max(_FINALISTS, -(-len(alive) // 2))]


def _best_of_each_strategy(contest: _Contest) -> list[_Entry]:
    """Return the best contender of each strategy, by name, of those judged on all images."""
    best: dict[str, _Entry] = {}
    for entry, images, _ in contest.ranked():
        if images == contest.judge.images:
            best.setdefault(entry.problem.strategy.name, entry)
    return list(best.values())


def _refined(contest: _Contest, entry: _Entry, calibration: Calibration, which: str) -> None:
    """Try schedules that damage measured block by block proposes, and others around the best."""
    problem, judge = entry.problem, contest.judge
    images = min(size for size in judge.rounds if size >= min(_TABLE_IMAGES, judge.images))

    def on_few(counts: Counts) -> float:
        return judge(problem.plan(counts), images)

    def told(label: str, done: int, total: int) -> None:
        contest.progress(f"{problem.strategy.name} ({which}), {label}", done, total)

    damage = measured_damage(problem.found.sites, calibration.points, on_few, images, told)
    refine = max(calibration.refine, _REFINE)
    search = Search(lambda counts: _tried(contest, problem, counts, REFINED), 2 + refine, told)
    search.try_out(entry.counts)
    calibrated = problem.solve(damage)
    search.seen[calibrated] = _tried(contest, problem, calibrated, CALIBRATED)
    search.weigh_anew(damage, problem.solve, refine)


def _tried(contest: _Contest, problem: Problem, counts: Counts, how: str) -> float:
    return contest.try_out(_Entry(problem, counts, how), contest.judge.images)


def _varied(contest: _Contest, problem_of: ProblemOf) -> None:
    """Try the best contender's variants on its schedule, where they have the same sites there and keep the budget."""
    tried: set[Strategy] = set()
    for _ in range(_TURNS):
        best, _, least = contest.ranked()[0]
        variants = [each for each in best.problem.strategy.variants() if each not in tried]
        tried.update(variants)
        for number, variant in enumerate(variants):
            contest.progress(f"variants of {variant.name}", number, len(variants))
            try:
                problem = problem_of(variant)
            except (UnsupportedModelError, OptionError):
                continue
            # At the same block a count may be of tokens for one of them, and of windows for the other.
            own, its = ([(s.block, s.whole) for s in each.found.sites] for each in (problem, best.problem))
            if own == its and problem.model.cost(best.counts) <= problem.limit:
                _tried(contest, problem, best.counts, best.how)
        if contest.ranked()[0][2] >= least:
            break


def _reason(error: GtpError) -> str:
    """Return why a strategy can't take part, in one line: what the error says, and the first of several causes."""
    return " ".join(line.removeprefix("  - ") for line in str(error).splitlines()[:2])
