"""Pipeline from a captured graph to an optimised one: exact passes, a plan, the passes that carry it out, a report."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx
from torch.ops import gtp_fx  # type: ignore[import-not-found]

from gtp_fx.analysis.returned_tokens import ReturnedTokens, returned_tokens
from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.capture.module import MADE_FOR, NOT_KEPT
from gtp_fx.errors import OptionError
from gtp_fx.graph.nodes import layer_name, operator_name
from gtp_fx.graph.torch_internals import code_when_called
from gtp_fx.graph.verify import check_outputs
from gtp_fx.model.shorter_outputs import must_be_shorter
from gtp_fx.options.options import Options
from gtp_fx.options.schedule import Schedule
from gtp_fx.passes.exact.mark_tokens import mark_tokens
from gtp_fx.passes.journal import Journal
from gtp_fx.passes.order import must_be_optional
from gtp_fx.passes.reduce.insert_coercions import RECOVERED
from gtp_fx.passes.reduce.remove_tokens import RETURNED
from gtp_fx.passes.runner import PassStep, apply_plan, apply_plan_unverified, run_exact_tier
from gtp_fx.plan.cost.count import count_flops
from gtp_fx.plan.make_plan import Planned, make_plan
from gtp_fx.plan.plan import Plan
from gtp_fx.plan.problem import Original
from gtp_fx.plan.site import BranchCost, RestCost
from gtp_fx.report.attention_maps import AttentionRecord, record_attention
from gtp_fx.report.forecasting import forecast
from gtp_fx.report.provenance import SiteRecord, record_sites
from gtp_fx.report.report import Report, ReturnedRow, SiteRow
from gtp_fx.strategies import Auto, Grouping, Strategy
from gtp_fx.strategies.registry import is_own
from gtp_fx.strategies.trial import try_out
from gtp_fx.types.axes import size
from gtp_fx.types.infer import TOKENS


@dataclass(frozen=True)
class Optimised:
    """A rewritten graph.

    graph_module: the graph.
    schedule: tokens that each block removes in it.
    strategy: how it removes them.
    report: what was done.
    sites: the sites that remove tokens, for `gtp_fx.report.provenance`.
    attention: the blocks' attention, for `gtp_fx.report.attention_maps`.
    returned: the outputs that run over tokens, with output="reduced", for `gtp_fx.report.kept_tokens`.
    """

    graph_module: fx.GraphModule
    schedule: Schedule
    strategy: Strategy
    report: Report
    sites: tuple[SiteRecord, ...] = ()
    attention: tuple[AttentionRecord, ...] = ()
    returned: tuple[ReturnedTokens, ...] = ()


@dataclass(frozen=True)
class Exact:
    """A graph whose exact passes have run.

    graph_module: the graph, its blocks marked.
    original: the graph before these passes, and its FLOPs.
    steps: what each pass did.
    journal: the record of the passes, which later ones continue.
    """

    graph_module: fx.GraphModule
    original: Original
    steps: tuple[PassStep, ...]
    journal: Journal


@code_when_called()
def run_passes(captured: fx.GraphModule, options: Options, blocks_needed: bool = True) -> Optimised:
    """Rewrite a captured graph, whose nodes have `meta["val"]`; `captured` itself is not changed.

    blocks_needed: whether a graph without attention over patches is refused; else only the exact passes run on it, also
        where tokens come in as an argument, whose places in the model's own schedule aren't known.

    Raises a GtpError where the graph can't be optimised as `options` require.
    """
    if not blocks_needed:
        options = replace(options, disabled_passes=(*options.disabled_passes, mark_tokens.__name__))
    exact = run_exact_passes(captured, options)
    gm = exact.graph_module
    planned = make_plan(gm, options, exact.original, apply_plan_unverified, blocks_needed)
    plan: Plan = planned.plan
    result, steps = apply_plan(gm, plan, exact.original.flops, exact.journal)
    returned = _returned(gm, result) if options.as_left else ()
    if options.as_left and blocks_needed:
        must_be_shorter(result.graph, returned, plan)
    # Verify the outcome: outputs as before, the strategy's own operators usable, FLOPs as priced.
    check_outputs(captured, result, {kept.number: (kept.dim, size((kept.axis,), plan.count)) for kept in returned})
    try_out(result.graph)
    after = count_flops(result.graph)
    if after != planned.flops:
        if isinstance(plan.strategy, Grouping) and not is_own(type(plan.strategy)):
            raise OptionError(
                f"with strategy {plan.strategy.name!r} the model was priced at {planned.flops} FLOPs per image, and it "
                f"takes {after}: {type(plan.strategy).__name__}.group_flops has to return the FLOPs of the matrix "
                f"products in group()"
            )
        raise AssertionError(f"the plan priced this graph at {planned.flops} FLOPs, and it has {after}")
    report = Report(
        flops_before=exact.original.flops,
        flops_after=after,
        flops_budget=options.flops_budget,
        strategy=str(plan.strategy),
        strategy_name=plan.strategy.name,
        target=options.target.name,
        blocks=len(plan.schedule),
        passes=(*exact.steps, *steps),
        sites=_site_rows(gm, plan),
        refusals=planned.refusals,
        recovered=_recovered(result.graph),
        token_inputs=_token_inputs(gm.graph),
        damage_from=planned.damage_from,
        latency_budget=None if options.latency_budget is None else str(options.latency_budget),
        seconds=planned.seconds,
        batch=options.batch,
        forecast=forecast(gm, exact.original, planned, options),
        moved=planned.moved,
        strategy_from=_strategy_from(options, planned),
        contenders=planned.contenders,
        not_kept=captured.meta.get(NOT_KEPT, ()),
        made_for=captured.meta.get(MADE_FOR, ""),
        returned=tuple(
            ReturnedRow(kept.name, size((kept.axis,), plan.count), kept.axis.whole_size) for kept in returned
        ),
    )
    exact.journal.note("schedule", plan.schedule.to_json())
    exact.journal.note("report", str(report))
    sites, attention = record_sites(result), record_attention(result)
    return Optimised(result, plan.schedule, plan.strategy, report, sites, attention, returned)


@code_when_called()
def run_exact_passes(captured: fx.GraphModule, options: Options) -> Exact:
    """Run the exact passes and mark the blocks that plans are made from.

    Raises OptionError where `disabled_passes` names a pass that can't be left out.
    """
    must_be_optional(options.disabled_passes)
    journal = Journal.beginning(captured, options.dump_graphs)
    spelled, gm, steps = run_exact_tier(
        captured,
        options.first_strategy,
        journal,
        options.disabled_passes,
        options.prefix_tokens,
        options.as_left,
        options.target,
    )
    return Exact(gm, Original(spelled.graph, steps[0].flops), steps, journal)


def _returned(exact: fx.GraphModule, result: fx.GraphModule) -> tuple[ReturnedTokens, ...]:
    """Return the outputs that run over tokens, each at the level at which `result` returns it.

    exact: the graph before the plan, which says so where no token is removed.
    """
    found: tuple[ReturnedTokens, ...] | None = result.graph.output_node().meta.get(RETURNED)
    return returned_tokens(typed_graph(exact.graph).whole) if found is None else found


def _strategy_from(options: Options, planned: Planned) -> str:
    """Say what the strategy was chosen by; empty where it was given."""
    if not isinstance(options.strategy, Auto):
        return ""
    if planned.contenders:
        judged = [row for row in planned.contenders if row.moved is not None]
        return f"the one that moves outputs least on {judged[0].images} images, of {len(judged)} contenders"
    if options.calibration is None:
        return "the default, as there are no calibration images to choose by"
    return "the default, as no tokens have to be removed"


def _recovered(graph: fx.Graph) -> tuple[str, ...]:
    """List the readers of recovered values, by layer and operator, in graph order, each once."""
    readers = [
        ": ".join(filter(None, (layer_name(user), operator_name(user))))
        for node in graph.nodes
        if RECOVERED in node.meta
        for user in node.users
        if not any(node.target is gtp_fx.recover.default for node in (user, *user.users))  # one step of several
        if user.target is not gtp_fx.take_tokens.default  # by which a stream is tied to its output
    ]
    return tuple(dict.fromkeys(readers))


def _token_inputs(graph: fx.Graph) -> tuple[str, ...]:
    """List the arguments that are tokens, each with what is taken for granted of it."""
    return tuple(
        f"{node.name}: {axis.whole_size} tokens, on no known grid, so that neighbours are similar ones alone; "
        + (
            f"the first {axis.prefix} always stay (prefix_tokens=… says how many have to)"
            if axis.domain.grid.guarded
            else f"the first {axis.prefix} are prefix tokens"
        )
        for node in graph.nodes
        if (axis := node.meta.get(TOKENS)) is not None
    )


def _site_rows(gm: fx.GraphModule, plan: Plan) -> tuple[SiteRow, ...]:
    """Return the report's row for each site of the plan."""
    layers = {block.index: layer_name(block.attention) for block in typed_graph(gm.graph).blocks}
    rows = []
    for site in plan.sites:
        removed = plan.schedule.removed[site.block]
        before = site.others + plan.count(site.domain) if site.branch is None else site.branch.tokens
        windows = site.branch.windows if isinstance(site.branch, BranchCost) else 0
        patches = site.branch.patches if isinstance(site.branch, RestCost) else 0
        rows.append(SiteRow(site.block, layers[site.block], before, removed, before - removed, windows, patches))
    return tuple(rows)
