"""Deciding: which blocks can be sites, what a schedule costs there, how many tokens leave at each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx

from gtp_fx.attention_half import Turns, take_turns
from gtp_fx.axes import Grid, token_axis, whole_size
from gtp_fx.coercions import find_coercions
from gtp_fx.config import Options
from gtp_fx.cost.closed_form import FlopsModel, Site, branch_cost, flops_model
from gtp_fx.cost.count import count_flops
from gtp_fx.errors import BudgetError, NoBlocksError, Refusal, ScheduleError, UnsupportedModelError
from gtp_fx.graphs import operator_name
from gtp_fx.infer import infer_types
from gtp_fx.other_attention import other_attention
from gtp_fx.passes.find_blocks import AttentionBlock, read_blocks
from gtp_fx.plan import Plan
from gtp_fx.schedule import Schedule
from gtp_fx.scheduling import PRIORS, solve
from gtp_fx.sizes import per_image


@dataclass(frozen=True)
class Planned:
    """A plan, the FLOPs it was promised to cost (per image), and what was refused on the way."""

    plan: Plan
    flops: int
    refusals: tuple[Refusal, ...]


def make_plan(gm: fx.GraphModule, options: Options, original_flops: int) -> Planned:
    """Plan for `gm`, whose blocks are marked and whose exact passes have run.

    Raises UnsupportedModelError, BudgetError or ScheduleError; `gm` is not changed.
    """
    blocks = read_blocks(gm)
    others = other_attention(gm.graph, infer_types(gm.graph))
    exact_only = options.schedule in PRIORS and options.flops_budget == 1.0
    if not blocks and not (others and exact_only):
        raise NoBlocksError(_no_blocks(gm.graph), others)
    tokens = tuple(block.axis.domain.whole_count for block in blocks)
    asked = _asked(options.schedule, tokens)
    flops_now = count_flops(gm.graph)
    if _nothing_to_remove(asked, options, flops_now / original_flops):
        nothing = Plan(Schedule((0,) * len(blocks), tokens), (), options.strategy)
        return Planned(nothing, flops_now, others)
    turns = take_turns(blocks, infer_types(gm.graph), options.strategy)
    model = _price(gm.graph, blocks, turns, options, original_flops)
    by_site = _split(asked, blocks, model, options) if asked is not None else _solve(model, options)
    propagated = [0] * len(blocks)
    for site, count in zip(model.sites, by_site, strict=True):
        propagated[site.block] = count
    used = _numbered(site for site in model.sites if propagated[site.block])
    refusals = [
        *(block.refusal for block in blocks if block.refusal is not None and block.branch is None),
        *turns.refusals,
        *others,
    ]
    plan = Plan(Schedule(tuple(propagated), tokens), used, options.strategy)
    return Planned(plan, model.flops(by_site), tuple(refusals))


def _price(
    graph: fx.Graph, blocks: Sequence[AttentionBlock], turns: Turns, options: Options, original: int
) -> FlopsModel:
    """The closed form with a site at every block that may have one, or a refusal that says why there can't be any."""
    strategy = options.strategy
    candidates = [block for block in blocks if block.refusal is None and block.site is not None]
    branched = [(block, block.branch) for block in blocks if block.branch is not None]
    asked = [*((block, False) for block in candidates), *((block, True) for block, _ in branched)]
    unfit = [
        Refusal(block.layer, strategy.name, reason)
        for block, skipping in asked
        if (reason := strategy.refuse(block.axis, skipping))
    ]
    if unfit:
        raise UnsupportedModelError(f"strategy {strategy.name!r} can't work on this model", tuple(unfit))
    if not candidates and not branched:
        reasons = tuple(block.refusal for block in blocks if block.refusal is not None)
        raise UnsupportedModelError("no attention block of this model can lose tokens", reasons)
    typing = infer_types(graph, frozenset(block.site for block in candidates if block.site is not None))
    if obstacles := find_coercions(typing).refused:
        message = "tokens can't leave this model: what follows can't do without them (flops_budget=1.0 still works)"
        raise UnsupportedModelError(message, obstacles)
    whole = infer_types(graph)
    sites = []
    for block, branch in branched:
        heads = whole_size(whole.type(block.attention)[branch.heads])
        cost = branch_cost(branch, whole, heads, strategy, turns.halves.get(block.index))
        sites.append(Site(block.index, block.axis.domain, 0, cost.features, heads, branch=cost))
    for block in candidates:
        assert block.site is not None
        stream = typing.answers[block.site].output
        assert isinstance(stream, tuple)
        axis = token_axis(stream[1])
        assert axis is not None
        images = per_image(whole_size(stream[0]))
        heads = whole_size(typing.type(block.attention)[1])
        sites.append(Site(block.index, axis.domain, axis.prefix + axis.suffix, whole_size(stream[2]), heads, images))
    in_order = tuple(sorted(sites, key=lambda site: site.block))
    return flops_model(graph, typing, in_order, strategy, original)


def _asked(schedule: str | Schedule | tuple[int, ...], tokens: tuple[int, ...]) -> tuple[int, ...] | None:
    """The counts a user named, checked against the model; None where a prior is to find them."""
    if isinstance(schedule, str):
        return None
    counts = tuple(schedule)
    if len(counts) != len(tokens):
        raise ScheduleError(
            f"the schedule has {len(counts)} entries and the model {len(tokens)} attention blocks; give one count for each"
        )
    if isinstance(schedule, Schedule) and schedule.tokens != tokens:
        raise ScheduleError(
            f"this schedule was made for another model or image size: its blocks hold {_brief(schedule.tokens)} patch "
            f"tokens, this model's {_brief(tokens)}"
        )
    return counts


def _nothing_to_remove(asked: tuple[int, ...] | None, options: Options, ratio: float) -> bool:
    if asked is not None:
        return not any(asked)
    assert options.flops_budget is not None
    return ratio <= options.flops_budget


def _split(
    asked: tuple[int, ...], blocks: Sequence[AttentionBlock], model: FlopsModel, options: Options
) -> tuple[int, ...]:
    """A user's counts by site, refused where they can't be had."""
    left = Counter[object]()
    for block, count in zip(blocks, asked, strict=True):
        if count and block.refusal is not None and block.branch is None and not block.dead:
            raise ScheduleError(f"block {block.index} can't propagate {count} tokens: {block.refusal}")
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


def _solve(model: FlopsModel, options: Options) -> tuple[int, ...]:
    assert options.flops_budget is not None and isinstance(options.schedule, str)
    return solve(model, options.flops_budget, PRIORS[options.schedule])


def _numbered(sites: object) -> tuple[Site, ...]:
    """Sites with the level of their domain counted over these sites alone: only they shorten the stream."""
    levels = Counter[Grid]()
    numbered = []
    for site in sites:  # type: ignore[attr-defined]
        if site.branch is not None:
            numbered.append(site)
            continue
        numbered.append(replace(site, domain=site.domain.at(levels[site.domain.grid])))
        levels[site.domain.grid] += 1
    return tuple(numbered)


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


def _brief(tokens: tuple[int, ...]) -> str:
    return str(tokens[0]) if len(set(tokens)) == 1 else str(list(tokens))
