"""Running the passes in order, verifying each, recording what each did."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx
from torch.ops import gtp_fx  # type: ignore[import-not-found]

from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.errors import OptionError
from gtp_fx.graph.nodes import layer_name, operator_name
from gtp_fx.graph.verify import check_outputs
from gtp_fx.options.options import Options
from gtp_fx.options.schedule import Schedule
from gtp_fx.passes.exact.normalise import normalise
from gtp_fx.passes.journal import Journal
from gtp_fx.passes.order import must_be_optional
from gtp_fx.passes.reduce.remove_tokens import RECOVERED
from gtp_fx.passes.runner import PassStep, apply_plan, apply_plan_unverified, run_exact_tier
from gtp_fx.plan.cost.count import count_flops
from gtp_fx.plan.make_plan import Original, make_plan
from gtp_fx.plan.plan import Plan
from gtp_fx.report.forecasting import forecast
from gtp_fx.report.provenance import SiteRecord, record_sites
from gtp_fx.report.report import Report, SiteRow
from gtp_fx.strategies import Grouping, Strategy
from gtp_fx.strategies.trial import try_out


@dataclass(frozen=True)
class Optimised:
    """A rewritten graph, the schedule and the strategy that it carries out, and what was done.

    sites: what each did, for `gtp_fx.report.provenance`.
    """

    graph_module: fx.GraphModule
    schedule: Schedule
    strategy: Strategy
    report: Report
    sites: tuple[SiteRecord, ...] = ()


@dataclass(frozen=True)
class Exact:
    """A graph behind the exact passes, its blocks marked. original: before them. steps: what each did. journal: goes on with
    the passes behind."""

    graph_module: fx.GraphModule
    original: Original
    steps: tuple[PassStep, ...]
    journal: Journal


def run_passes(captured: fx.GraphModule, options: Options, blocks_needed: bool = True) -> Optimised:
    """Rewrite a captured graph. `captured` is not changed; its nodes carry `meta["val"]`.

    blocks_needed: whether a graph without attention over patches is refused; else the exact passes are all that it gets.
    """
    exact = run_exact_passes(captured, options)
    gm = exact.graph_module
    planned = make_plan(gm, options, exact.original, apply_plan_unverified, blocks_needed)
    plan: Plan = planned.plan
    result, steps = apply_plan(gm, plan, exact.original.flops, exact.journal)
    check_outputs(captured, result)
    try_out(result.graph)
    after = count_flops(result.graph)
    if after != planned.flops:
        if isinstance(plan.strategy, Grouping):
            raise OptionError(
                f"strategy {plan.strategy.name!r} was priced at {planned.flops} FLOPs per image with the model, and it takes {after}: "
                f"{type(plan.strategy).__name__}.group_flops has to give those of the matrix products in group()"
            )
        raise AssertionError(f"the plan priced this graph at {planned.flops} FLOPs, and it has {after}")
    report = Report(
        flops_before=exact.original.flops,
        flops_after=after,
        flops_budget=options.flops_budget,
        strategy=str(plan.strategy),
        target=options.target.name,
        blocks=len(plan.schedule),
        passes=(*exact.steps, *steps),
        sites=_site_rows(gm, plan),
        refusals=planned.refusals,
        recovered=_recovered(result.graph),
        damage_from=planned.damage_from,
        latency_budget=None if options.latency_budget is None else str(options.latency_budget),
        seconds=planned.seconds,
        batch=options.batch,
        forecast=forecast(gm, exact.original, planned, options),
        moved=planned.moved,
    )
    exact.journal.note("schedule", plan.schedule.to_json())
    exact.journal.note("report", str(report))
    return Optimised(result, plan.schedule, plan.strategy, report, record_sites(result))


def run_exact_passes(captured: fx.GraphModule, options: Options) -> Exact:
    """Run what changes no number, and mark what plans are made by. Raises OptionError for a pass that can't be left out."""
    must_be_optional(options.disabled_passes)
    # What no output depends on is none of the model's work: one door's capture drops it, the other's doesn't.
    spelled = normalise(captured)
    original = Original(spelled.graph, count_flops(spelled.graph))
    journal = Journal.beginning(captured, options.dump_graphs)
    gm, steps = run_exact_tier(captured, options.strategy, original.flops, journal, options.disabled_passes)
    return Exact(gm, original, steps, journal)


def _recovered(graph: fx.Graph) -> tuple[str, ...]:
    """The readers of recovered values, by layer and operator, in order, each once."""
    readers = [
        ": ".join(filter(None, (layer_name(user), operator_name(user))))
        for node in graph.nodes
        if RECOVERED in node.meta
        for user in node.users
        if not any(node.target is gtp_fx.recover.default for node in (user, *user.users))  # on to a level further back
    ]
    return tuple(dict.fromkeys(readers))


def _site_rows(gm: fx.GraphModule, plan: Plan) -> tuple[SiteRow, ...]:
    layers = {block.index: layer_name(block.attention) for block in typed_graph(gm.graph).blocks}
    rows = []
    for site in plan.sites:
        gone = plan.schedule.propagated[site.block]
        before = site.others + plan.count(site.domain) if site.branch is None else site.branch.tokens
        windows = 0 if site.branch is None else site.branch.windows
        rows.append(SiteRow(site.block, layers[site.block], before, gone, before - gone, windows))
    return tuple(rows)
