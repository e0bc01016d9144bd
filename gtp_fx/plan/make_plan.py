"""Planning from options: find the sites, price schedules there, and choose how many tokens each site removes."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import fx

from gtp_fx.analysis.blocks import AttentionBlock
from gtp_fx.analysis.typed_graph import TypedGraph, typed_graph
from gtp_fx.errors import BudgetError, NoBlocksError, Refusal, ScheduleError, UnsupportedModelError, merged
from gtp_fx.graph.nodes import bodies_of, operator_name
from gtp_fx.options.options import Options
from gtp_fx.options.progress import progress_bar
from gtp_fx.options.schedule import AUTO, BlockShape, Schedule
from gtp_fx.plan.choose import Choice, Contender, by_calibration, by_prior
from gtp_fx.plan.contest import by_contest
from gtp_fx.plan.cost.closed_form import flops_model
from gtp_fx.plan.cost.count import count_flops, uncounted
from gtp_fx.plan.damage.judge import ApplyPlan, Judge
from gtp_fx.plan.find_sites import Candidates, block_shape
from gtp_fx.plan.plan import Plan
from gtp_fx.plan.problem import Original, Problem
from gtp_fx.plan.shortest_path import OverBudget
from gtp_fx.strategies import Auto, Strategy
from gtp_fx.strategies.registry import as_written


@dataclass(frozen=True)
class Planned:
    """A plan with its predicted price, and what was refused on the way.

    plan: the schedule, sites and strategy.
    flops: predicted FLOPs of the rewritten graph, per image.
    refusals: attention at which no tokens can be removed, and why.
    damage_from: what the choice of counts rests on; empty where the user gave the counts.
    seconds: predicted for the original and for the result; None unless a latency budget was set.
    moved: divergence of the outputs on calibration's images; None without calibration.
    found: the candidate sites; None where nothing was to be removed and none were searched for.
    contenders: what strategy="auto" chose from, the best first; empty where it had nothing to choose by.
    """

    plan: Plan
    flops: int
    refusals: tuple[Refusal, ...]
    damage_from: str = ""
    seconds: tuple[float, float] | None = None
    moved: float | None = None
    found: Candidates | None = None
    contenders: tuple[Contender, ...] = ()


def make_plan(
    gm: fx.GraphModule, options: Options, original: Original, apply_plan: ApplyPlan, blocks_needed: bool = True
) -> Planned:
    """Plan the removal of tokens from `gm`, which has marked blocks and the exact passes applied, and stays unchanged.

    apply_plan: returns the graph that a plan gives, by which calibration judges schedules and strategies.
    blocks_needed: whether a graph without attention blocks is an error; else its plan changes nothing.

    Raises UnsupportedModelError, BudgetError or ScheduleError.
    """
    typed = typed_graph(gm.graph)
    blocks, others = typed.blocks, typed.unsupported_attention
    flops_now, unknown = count_flops(gm.graph), uncounted(gm.graph)
    strategy = options.first_strategy
    # Return without sites where the model has no blocks, or where the counts or the budget leave nothing to remove.
    if not blocks and not blocks_needed:
        return Planned(Plan.of((), (), (), strategy), flops_now, others)
    if not blocks and not (others and options.exact_only):
        raise NoBlocksError(_no_blocks(gm.graph, others), others)
    shapes = tuple(map(block_shape, blocks))
    given = _given_counts(options.schedule, shapes)
    if unknown and (options.latency_budget is not None or (options.flops_budget or 1.0) < 1.0):
        raise UnsupportedModelError(
            f"{options.budget} can't be kept, because some of this model's FLOPs aren't known: give the counts to "
            f"remove (schedule=[…]) and no budget, or, for an operator without a formula, register one "
            f"(torch.utils.flop_counter.register_flop_formula)",
            unknown,
        )
    if _nothing_to_remove(given, options, flops_now / original.flops):
        return Planned(Plan.of((), (), shapes, strategy), flops_now, (*others, *unknown))
    # Price every schedule over the candidate sites, then choose one.
    if given is not None:
        problem = Problem.of(typed, strategy, options, original)
        _must_be_planned_for(options.schedule, problem, strategy)
        choice = Choice(_split(given, blocks, problem, options), problem)
    else:
        choice = _choose_for_any_batch(options, original, lambda asked: _choose(gm, typed, asked, original, apply_plan))
    problem = choice.problem
    plan = problem.plan(choice.counts)
    flops = problem.flops
    if plan.strategy != problem.strategy:  # settled for the counts, it may cost something else
        flops = flops_model(problem.found.typing, problem.found.sites, plan.strategy, original.flops)
    refusals = [
        *(block.refusal for block in blocks if block.refusal is not None and block.branch is None),
        *problem.found.left_out.values(),
        *problem.found.restless.values(),
        *others,
        *unknown,
    ]
    timed = None if options.latency_budget is None else problem.model
    return Planned(
        plan,
        flops.cost(choice.counts),
        merged(refusals),
        choice.origin,
        None if timed is None else (timed.original, timed.cost(choice.counts)),
        choice.moved,
        problem.found,
        choice.contenders,
    )


def _choose_for_any_batch(options: Options, original: Original, choose: Callable[[Options], Choice]) -> Choice:
    """Choose counts that keep to a FLOPs budget with one image in a batch and with any number.

    Where a batch holds images of the model's own beside those of the call (B + 1), each part of the graph grows by
    another factor. If both totals are straight lines in the number of images, it suffices that the budget holds for one
    image and for what each further image adds. A model that compares all images of a batch is held to it at one image.

    choose: chooses within the budget of some options at one image. Raises BudgetError where it can't be reached.
    """
    one, two, three = (count_flops(original.graph, batch) for batch in (1, 2, 3))
    asked, budget, rest = options, options.flops_budget, three - two
    if budget is None or rest != two - one or rest in (0, one):  # of no image, or of each image alike
        return choose(options)
    while True:
        choice = choose(asked)
        found = choice.problem.found
        costs = [
            flops_model(found.typing, found.sites, choice.problem.strategy, original.flops, batch).cost(choice.counts)
            for batch in (1, 2)
        ]
        over = (costs[1] - costs[0]) / rest - budget
        if over <= 0 or any(site.branch is not None for site in found.sites):
            return choice
        assert asked.flops_budget is not None
        asked = replace(asked, flops_budget=asked.flops_budget - over)


def _choose(
    gm: fx.GraphModule, typed: TypedGraph, options: Options, original: Original, apply_plan: ApplyPlan
) -> Choice:
    """Choose the counts of a schedule given by name ("auto", "uniform", "even") under the budget.

    Raises BudgetError where no schedule is within the budget.
    """
    problem_of = functools.cache(lambda strategy: Problem.of(typed, strategy, options, original))
    auto = options.strategy if isinstance(options.strategy, Auto) and options.calibration is not None else None
    assert isinstance(options.schedule, str)
    try:
        if auto is None:
            problem = problem_of(options.first_strategy)
            if options.schedule != AUTO:
                return Choice(problem.by_rule(options.schedule), problem)
            if options.calibration is None:
                return by_prior(problem)
        assert options.calibration is not None
        judge = Judge.of(gm, options.calibration, apply_plan)
        try:
            with progress_bar(shown=options.calibration.progress) as show:
                if auto is None:
                    return by_calibration(problem, judge, options.calibration, show)
                return by_contest(auto, problem_of, judge, options.calibration, show)
        finally:  # what was judged stays known, also where it was interrupted
            judge.kept.write()
    except OverBudget as over:
        raise _budget_error(over, options, problem_of(options.first_strategy)) from None


def _budget_error(over: OverBudget, options: Options, problem: Problem) -> BudgetError:
    """Return the error for a budget that no schedule keeps. problem: of the strategy, or the first of several."""
    on = "" if options.latency_budget is None else f" on target {options.target.name!r}, {options.batch} images,"
    advice = "" if options.schedule == AUTO else "; schedule='auto' may go lower"
    absolute = options.latency_budget is not None and options.latency_budget.seconds is not None
    lowest = f" ({_round_up(over.cost * 1e3):.3f} ms)" if absolute else ""
    ratio = _round_up(over.cost / problem.model.original)
    return BudgetError(
        f"{options.budget}{on} can't be reached: the lowest ratio that schedule={options.schedule!r} gives "
        f"on this model is {ratio:.3f}{lowest}{advice}{_left_out(problem.found)}",
        lowest=ratio,
    )


def _left_out(found: Candidates) -> str:
    """Return the end of a message about what a plan can't reach: the blocks that take no part in it, and why."""
    if not found.left_out:
        return ""
    return "\n  - ".join(["; these blocks take no part in it", *map(str, found.left_out.values())])


def _given_counts(schedule: str | Schedule | tuple[int, ...], shapes: tuple[BlockShape, ...]) -> tuple[int, ...] | None:
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


def _must_be_planned_for(schedule: object, problem: Problem, strategy: Strategy) -> None:
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


def _nothing_to_remove(given: tuple[int, ...] | None, options: Options, ratio: float) -> bool:
    """Return whether all counts are 0, or the exact passes alone (`ratio` of the original's FLOPs) meet the budget."""
    if given is not None:
        return not any(given)
    return options.flops_budget is not None and ratio <= options.flops_budget


def _split(
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
    by_site = tuple(given[site.block] for site in model.sites)
    ratio = model.ratio(by_site)
    if options.flops_budget is not None and ratio > options.flops_budget:
        raise BudgetError(
            f"this schedule costs {ratio:.4f} of the original's FLOPs, over flops_budget={options.flops_budget:g}: "
            f"remove more tokens, or leave the budget out"
        )
    return by_site


def _no_blocks(graph: fx.Graph, others: Sequence[Refusal]) -> str:
    """Return the headline for a graph without blocks: what it has instead, and what stopped it.

    others: attention that is no block.
    """
    counts = Counter(operator_name(n) for n in _calls(graph))
    attention = sum(n for name, n in counts.items() if "attention" in name)
    softmax = sum(n for name, n in counts.items() if "softmax" in name)
    convolutions = sum(n for name, n in counts.items() if "conv" in name)
    found = f"{attention} attention operators, {softmax} softmax, {convolutions} convolutions"
    if others:
        return (
            f"this model has attention ({found}), and none of it was recognised as self-attention over patch tokens, "
            f"which is what gtp_fx shortens (flops_budget=1.0 still works):"
        )
    return (
        f"no self-attention over patch tokens was found in this model's graph ({found}): gtp_fx shortens the token "
        f"stream of vision transformers, and finds none here"
    )


def _calls(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the calls of a graph, and those inside its higher-order operators."""
    for node in graph.nodes:
        if node.op == "call_function":
            yield node
            for body in bodies_of(node):
                yield from (call for call in body.nodes if call.op == "call_function")


def _round_up(ratio: float) -> float:
    """Round up to three digits, so that asking for the number in the message succeeds."""
    return -(-ratio * 1000 // 1) / 1000
