"""Deciding: which blocks can be sites, what a schedule costs there, how many tokens leave at each."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx

from gtp_fx.analysis.blocks import AttentionBlock
from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.errors import BudgetError, NoBlocksError, Refusal, ScheduleError
from gtp_fx.graph.nodes import operator_name
from gtp_fx.options.options import Options
from gtp_fx.options.schedule import AUTO, BlockShape, Schedule
from gtp_fx.plan.choose import ApplyPlan, Choice, by_calibration, by_prior
from gtp_fx.plan.cost.chains import CostModel
from gtp_fx.plan.cost.closed_form import flops_model
from gtp_fx.plan.cost.count import count_flops
from gtp_fx.plan.cost.seconds import graph_seconds, seconds_model
from gtp_fx.plan.damage.tables import Damage
from gtp_fx.plan.fastest import fastest_alike
from gtp_fx.plan.find_sites import Candidates, block_shape, find_sites
from gtp_fx.plan.least_damage import least_damage, least_damage_few_sites
from gtp_fx.plan.plan import Plan, leaving_by_stream
from gtp_fx.plan.shortest_path import OverBudget
from gtp_fx.plan.uniform import SCHEDULE_FAMILIES, mildest_within
from gtp_fx.strategies import Strategy


@dataclass(frozen=True)
class Planned:
    """A plan, the FLOPs it was promised to cost (per image), what is expected of it, and what was refused on the way.

    damage_from: what the choice of counts rests on; empty where a user named them.
    seconds: predicted for the original and the result, None where no budget asked for them. moved: how far outputs moved on
    calibration's images, None without. found: the sites it was chosen from, None where nothing was to leave, so that none were looked for.
    """

    plan: Plan
    flops: int
    refusals: tuple[Refusal, ...]
    damage_from: str = ""
    seconds: tuple[float, float] | None = None
    moved: float | None = None
    found: Candidates | None = None


@dataclass(frozen=True)
class Original:
    """The model as it came, in the passes' spelling: what ratios are taken of. flops: per image."""

    graph: fx.Graph
    flops: int


def make_plan(
    gm: fx.GraphModule, options: Options, original: Original, apply_plan: ApplyPlan, blocks_needed: bool = True
) -> Planned:
    """Plan for `gm`, whose blocks are marked and whose exact passes have run; where it has none and needs none, to change nothing.

    apply_plan: what calibration judges schedules by.
    Raises UnsupportedModelError, BudgetError or ScheduleError; `gm` is not changed.
    """
    typed = typed_graph(gm.graph)
    blocks, others = typed.blocks, typed.unsupported_attention
    flops_now = count_flops(gm.graph)
    if not blocks and not blocks_needed:
        return Planned(Plan.of((), (), (), options.strategy), flops_now, others)
    if not blocks and not (others and options.exact_only):
        raise NoBlocksError(_no_blocks(gm.graph), others)
    shapes = tuple(map(block_shape, blocks))
    asked = _asked(options.schedule, shapes)
    if _nothing_to_remove(asked, options, flops_now / original.flops):
        return Planned(Plan.of((), (), shapes, options.strategy), flops_now, others)
    found = find_sites(typed, options.strategy)
    options = replace(options, strategy=_settled_early(options.strategy, found))
    flops = flops_model(found.typing, found.sites, options.strategy, original.flops)
    timed = None if options.latency_budget is None else _seconds(found, options, original)
    if asked is not None:
        choice = Choice(_split(asked, blocks, flops, options), options.strategy, "")
    else:
        choice = _choose(gm, found, shapes, flops if timed is None else timed, options, original, apply_plan)
    plan = Plan.of(found.sites, choice.counts, shapes, choice.strategy)
    if plan.strategy != options.strategy:
        flops = flops_model(found.typing, found.sites, plan.strategy, original.flops)
    refusals = [
        *(block.refusal for block in blocks if block.refusal is not None and block.branch is None),
        *others,
    ]
    return Planned(
        plan,
        flops.cost(choice.counts),
        tuple(refusals),
        choice.origin,
        None if timed is None else (timed.original, timed.cost(choice.counts)),
        choice.moved,
        found,
    )


def _settled_early(strategy: Strategy, found: Candidates) -> Strategy:
    """The strategy with what no schedule changes decided before it is priced: that token scales are too small to be told."""
    worst = strategy.settled(leaving_by_stream(found.sites, [site.whole - 1 for site in found.sites]))
    return strategy if worst.reads_scales else worst


def _choose(
    gm: fx.GraphModule,
    found: Candidates,
    shapes: tuple[BlockShape, ...],
    model: CostModel,
    options: Options,
    original: Original,
    apply_plan: ApplyPlan,
) -> Choice:
    """The counts that a schedule by name means under the budget."""
    limit = options.limit(model.original)

    def model_of(strategy: Strategy) -> CostModel:
        if strategy == options.strategy:
            return model
        if options.latency_budget is not None:
            return _seconds(found, replace(options, strategy=strategy), original)
        return flops_model(found.typing, found.sites, strategy, original.flops)

    # Calibration solves many times over.
    timed = functools.cache(lambda: _seconds(found, options, original))

    def solve(damage: Damage) -> tuple[int, ...]:
        if options.latency_budget is not None:
            return least_damage(model, damage, limit)
        if options.target.has_kernels:
            return fastest_alike(model, timed(), damage, limit)
        return least_damage_few_sites(model, damage, limit)

    assert isinstance(options.schedule, str)
    try:
        if options.schedule != AUTO:
            return Choice(mildest_within(model, limit, SCHEDULE_FAMILIES[options.schedule]), options.strategy, "")
        if options.calibration is None:
            return by_prior(model, options.strategy, solve)
        return by_calibration(
            gm, found, shapes, model_of, options.strategy, limit, options.calibration, solve, apply_plan
        )
    except OverBudget as over:
        on = "" if options.latency_budget is None else f" on target {options.target.name!r}, {options.batch} images,"
        advice = "" if options.schedule == AUTO else "; schedule='auto' may go lower"
        absolute = options.latency_budget is not None and options.latency_budget.seconds is not None
        lowest = f" ({_round_up(over.cost * 1e3):.3f} ms)" if absolute else ""
        raise BudgetError(
            f"{options.budget}{on} can't be reached: the lowest ratio that schedule={options.schedule!r} gives on this model "
            f"is {_round_up(over.cost / model.original):.3f}{lowest}{advice}"
        ) from None


def _seconds(found: Candidates, options: Options, original: Original) -> CostModel:
    target, batch = options.target, options.batch
    before = graph_seconds(original.graph, target, batch)
    return seconds_model(found.typing, found.sites, options.strategy, target, batch, before, found.branches)


def _asked(schedule: str | Schedule | tuple[int, ...], shapes: tuple[BlockShape, ...]) -> tuple[int, ...] | None:
    """The counts a user named, checked against the model; None where they are to be found."""
    if isinstance(schedule, str):
        return None
    if isinstance(schedule, Schedule):
        schedule.must_fit(shapes)
    counts = tuple(schedule)
    if len(counts) != len(shapes):
        raise ScheduleError(
            f"the schedule has {len(counts)} entries and the model {len(shapes)} attention blocks; give one count for each"
        )
    return counts


def _nothing_to_remove(asked: tuple[int, ...] | None, options: Options, ratio: float) -> bool:
    if asked is not None:
        return not any(asked)
    return options.flops_budget is not None and ratio <= options.flops_budget


def _split(
    asked: tuple[int, ...], blocks: Sequence[AttentionBlock], model: CostModel, options: Options
) -> tuple[int, ...]:
    """A user's counts by site, refused where they can't be had."""
    left = Counter[object]()
    sites = {site.block for site in model.sites}
    for block, count in zip(blocks, asked, strict=True):
        if count and block.refusal is not None and block.branch is None and not block.dead:
            raise ScheduleError(f"block {block.index} can't propagate {count} tokens: {block.refusal}")
        if count and block.refusal is None and not block.dead and block.index not in sites:
            raise ScheduleError(
                f"block {block.index} can't lose {count} tokens: strategy {options.strategy.name!r} takes them at blocks "
                f"{', '.join(map(str, sorted(sites)))} alone"
            )
        stream = block.axis.domain.grid if block.branch is None else block.index
        left[stream] += 0 if block.dead else count
        if left[stream] >= block.axis.domain.whole_count:
            raise ScheduleError(
                f"the schedule removes {left[stream]} patch tokens by block {block.index}, of {block.axis.domain.whole_count}; "
                f"at least one has to stay"
            )
    by_site = tuple(asked[site.block] for site in model.sites)
    ratio = model.ratio(by_site)
    if options.flops_budget is not None and ratio > options.flops_budget:
        raise BudgetError(
            f"this schedule costs {ratio:.4f} of the original's FLOPs, over flops_budget={options.flops_budget:g}: remove more "
            f"tokens, or leave the budget out"
        )
    return by_site


def _no_blocks(graph: fx.Graph) -> str:
    """Name what the graph has instead of self-attention over patches."""
    counts = Counter(operator_name(n) for n in graph.nodes if n.op == "call_function")
    attention = sum(n for name, n in counts.items() if "attention" in name)
    softmax = sum(n for name, n in counts.items() if "softmax" in name)
    convolutions = sum(n for name, n in counts.items() if "conv" in name)
    return (
        f"no self-attention over patch tokens was found in this model's graph ({attention} attention operators, {softmax} "
        f"softmax, {convolutions} convolutions): gtp_fx shortens the token stream of vision transformers, and finds none "
        f"here"
    )


def _round_up(ratio: float) -> float:
    """To three digits, so that the number named can be asked for."""
    return -(-ratio * 1000 // 1) / 1000
