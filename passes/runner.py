"""Running passes in their order: each verified, each accounted for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from gtp_fx.graph.verify import propagate_shapes
from gtp_fx.passes.journal import Journal
from gtp_fx.passes.order import Pass, bound, of_tier
from gtp_fx.plan.cost.count import count_flops
from gtp_fx.plan.plan import Plan
from gtp_fx.strategies import Strategy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PassStep:
    """One pass that ran: its tier ("exact" or "approximate"), the FLOPs per image and the graph's operators after it."""

    name: str
    tier: str
    flops: int
    operators: int


def run_exact_tier(
    gm: fx.GraphModule, strategy: Strategy, original: int, journal: Journal, disabled: Sequence[str] = ()
) -> tuple[fx.GraphModule, tuple[PassStep, ...]]:
    """Run the exact passes but for disabled ones. original: FLOPs per image, which the log's ratios are taken of."""
    steps = []
    for step in of_tier("exact"):
        if step.name in disabled:
            log.info("%s: disabled", step.name)
            continue
        gm, done = _run(step, gm, strategy, None, original, journal)
        steps.append(done)
    return gm, tuple(steps)


def apply_plan(
    gm: fx.GraphModule, plan: Plan, original: int, journal: Journal
) -> tuple[fx.GraphModule, tuple[PassStep, ...]]:
    """Run the passes that carry out a plan on `gm`, whose exact passes have run. original: as above."""
    steps = []
    for step in of_tier("reduce", plan):
        gm, done = _run(step, gm, plan.strategy, plan, original, journal)
        steps.append(done)
    return gm, tuple(steps)


def apply_plan_unverified(gm: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """What `apply_plan` makes, its last pass unverified, in half the time: for graphs that are run at once and thrown away."""
    passes = of_tier("reduce", plan)
    for number, step in enumerate(passes, start=1):
        gm = bound(step, plan.strategy, plan)(gm)
        if number < len(passes):  # the next one reads shapes
            propagate_shapes(gm, after=step.name)
    return gm


def _run(
    step: Pass, gm: fx.GraphModule, strategy: Strategy, plan: Plan | None, original: int, journal: Journal
) -> tuple[fx.GraphModule, PassStep]:
    """Run one pass, verify what it made, and note it."""
    result = bound(step, strategy, plan)(gm)
    if result is not gm:  # a pass with nothing to do may hand back what it got
        propagate_shapes(result, after=step.name)
    done = PassStep(step.name, step.kind, count_flops(result.graph), _operators(result.graph))
    journal.page(step.name, result)
    ratio = done.flops / max(original, 1)
    log.info("%s (%s): %d operators, %.4f of the FLOPs", step.name, step.kind, done.operators, ratio)
    return result, done


def _operators(graph: fx.Graph) -> int:
    return sum(node.op == "call_function" for node in graph.nodes)
