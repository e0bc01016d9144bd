"""Counts of tokens that the user gave, checked against the model and taken site by site."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from gtp_fx.analysis.blocks import AttentionBlock
from gtp_fx.errors import BudgetError, ScheduleError
from gtp_fx.options.options import Options
from gtp_fx.options.schedule import BlockShape, Schedule
from gtp_fx.plan.problem import Problem
from gtp_fx.strategies import Strategy
from gtp_fx.strategies.registry import as_written


def given_counts(schedule: str | Schedule | tuple[int, ...], shapes: tuple[BlockShape, ...]) -> tuple[int, ...] | None:
    """Return the counts a user gave, or None where a schedule is to be chosen.

    Raises ScheduleError where they don't fit the model's blocks.
    """
    if isinstance(schedule, str):
        return None
    if isinstance(schedule, Schedule):
        schedule.must_fit(shapes)
    counts = tuple(schedule)
    if len(counts) != len(shapes):
        raise ScheduleError(
            f"the schedule has {len(counts)} entries and the model {len(shapes)} attention blocks; "
            f"give one count for each"
        )
    return counts


def must_be_planned_for(schedule: object, problem: Problem, strategy: Strategy) -> None:
    """Check that a Schedule was planned for the strategy given. Counts alone are for any.

    strategy: as it was given. A schedule has it settled for its counts.

    Raises ScheduleError.
    """
    if not isinstance(schedule, Schedule) or not schedule.strategy:
        return
    names = [as_written(strategy), as_written(problem.strategy)]
    if schedule.strategy not in names and schedule.strategy.partition("(")[0] == strategy.name:
        counts = [schedule.removed[site.block] for site in problem.found.sites]
        names.append(as_written(problem.plan(counts).strategy))
    schedule.must_be_for(names)


def by_site(
    given: tuple[int, ...], blocks: Sequence[AttentionBlock], problem: Problem, options: Options
) -> tuple[int, ...]:
    """Return a user's counts, one per site.

    Raises ScheduleError where a block can't remove its count or a stream would lose every patch, and BudgetError where
    a FLOPs budget was set as well and the counts are over it.
    """
    removed = Counter[object]()
    model, found = problem.flops, problem.found
    sites = {site.block for site in model.sites}
    for block, count in zip(blocks, given, strict=True):
        if count and block.refusal is not None and block.branch is None and not block.dead:
            raise ScheduleError(f"block {block.index} can't remove {count} tokens: {block.refusal}")
        if count and block.index in found.left_out:
            raise ScheduleError(f"block {block.index} can't remove {count} tokens: {found.left_out[block.index]}")
        if count and block.refusal is None and not block.dead and block.index not in sites:
            raise ScheduleError(
                f"block {block.index} can't remove {count} tokens: strategy {problem.strategy.name!r} "
                f"takes them at blocks {', '.join(map(str, sorted(sites)))} alone"
            )
        # Count along each stream, or on a branch's own block: a schedule has to keep one patch of each.
        stream = block.axis.domain.grid if block.branch is None else block.index
        removed[stream] += 0 if block.dead else count
        rest = found.rests.get(block.index)
        whole, what = (
            (block.axis.domain.whole_count, "removes {} patch tokens")
            if rest is None
            else (rest.whole, "lets {} windows rest")
        )
        if removed[stream] >= whole:
            raise ScheduleError(
                f"the schedule {what.format(removed[stream])} by block {block.index}, of {whole}; "
                f"at least one has to stay"
            )
    counts = tuple(given[site.block] for site in model.sites)
    ratio = model.ratio(counts)
    if options.flops_budget is not None and ratio > options.flops_budget:
        raise BudgetError(
            f"this schedule costs {ratio:.4f} of the original's FLOPs, over flops_budget={options.flops_budget:g}: "
            f"remove more tokens, or leave the budget out"
        )
    return counts
