"""Runner of the passes, in their order: each is verified and accounted for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import fx

from gtp_fx.graph.verify import propagate_shapes
from gtp_fx.passes.exact.mark_outputs import mark_outputs
from gtp_fx.passes.journal import Journal
from gtp_fx.passes.order import Pass, bound, of_tier
from gtp_fx.plan.cost.count import count_flops
from gtp_fx.plan.plan import Plan
from gtp_fx.strategies import Strategy
from gtp_fx.targets.target import Target

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PassStep:
    """One pass that ran.

    name: the pass.
    tier: "exact" or "approximate".
    flops: FLOPs per image after it.
    operators: operator calls in the graph after it.
    """

    name: str
    tier: str
    flops: int
    operators: int


def run_exact_tier(
    gm: fx.GraphModule,
    strategy: Strategy,
    journal: Journal,
    disabled: Sequence[str] = (),
    prefix_tokens: int | None = None,
    as_left: bool = False,
    target: Target | None = None,
) -> tuple[fx.GraphModule, fx.GraphModule, tuple[PassStep, ...]]:
    """Run the exact passes, except disabled ones. Return the original as ratios refer to it, the graph, and the steps.

    The original is what the first pass, `normalise`, makes: Dynamo's graphs have dead code until then.

    prefix_tokens: as the user said; None where nobody did.
    as_left: whether maps of tokens are returned with those that are left.
    target: the processor that the graph is for; None where passes don't ask what it gains.
    """
    spelled, steps = gm, list[PassStep]()
    for step in of_tier("exact"):
        if step.name in disabled:
            log.info("%s: disabled", step.name)
            continue
        run = bound(step, strategy, None, prefix_tokens, as_left, target)
        original = steps[0].flops if steps else None
        gm, done = _run(step, gm, run, original, journal, steps)
        spelled = spelled if steps else gm
        steps.append(done)
    return spelled, gm, tuple(steps)


def apply_plan(
    gm: fx.GraphModule, plan: Plan, original: int, journal: Journal
) -> tuple[fx.GraphModule, tuple[PassStep, ...]]:
    """Run the passes that carry out a plan; return the graph and what each did.

    gm: a graph whose exact passes have run.
    original: FLOPs per image of the original, for the ratios in the log.
    """
    steps: list[PassStep] = []
    for step in of_tier("reduce", plan):
        gm, done = _run(step, gm, bound(step, plan.strategy, plan), original, journal, steps)
        steps.append(done)
    return gm, tuple(steps)


def apply_plan_unverified(gm: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """Return what `apply_plan` does, without verifying the last pass, which takes half the time.

    For graphs that are run at once, compared with the original token by token, and discarded: their outputs have all
    tokens in any case.
    """
    gm = mark_outputs(gm, as_left=False)
    passes = of_tier("reduce", plan)
    for number, step in enumerate(passes, start=1):
        gm = bound(step, plan.strategy, plan)(gm)
        if number < len(passes):  # the next one reads shapes
            propagate_shapes(gm, after=step.name)
    return gm


def _run(
    step: Pass,
    gm: fx.GraphModule,
    run: Callable[[fx.GraphModule], fx.GraphModule],
    original: int | None,
    journal: Journal,
    before: Sequence[PassStep],
) -> tuple[fx.GraphModule, PassStep]:
    """Run one pass, `run` with its arguments bound, verify its result, and record it.

    original: FLOPs per image of the original; None where this pass makes the graph that ratios refer to.
    before: what the passes before it did, of which the last made `gm`.
    """
    result = run(gm)
    if result is not gm:  # a pass with nothing to do may return its input
        propagate_shapes(result, after=step.name)
    if result is gm and before:
        done = replace(before[-1], name=step.name, tier=step.kind)
    else:
        done = PassStep(step.name, step.kind, count_flops(result.graph), _operators(result.graph))
    journal.page(step.name, result)
    ratio = done.flops / max(done.flops if original is None else original, 1)
    log.info("%s (%s): %d operators, %.4f of the FLOPs", step.name, step.kind, done.operators, ratio)
    return result, done


def _operators(graph: fx.Graph) -> int:
    """Count the operator calls of a graph."""
    return sum(node.op == "call_function" for node in graph.nodes)
