"""Running passes: each verified, each accounted for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import fx

from gtp_fx.cost.count import count_flops
from gtp_fx.passes.insert_branches import insert_branches
from gtp_fx.passes.insert_propagation import insert_propagation
from gtp_fx.plan import Plan
from gtp_fx.report import PassStep
from gtp_fx.shapes import propagate_shapes

log = logging.getLogger(__name__)


def carry_out(gm: fx.GraphModule, plan: Plan, original: int) -> tuple[fx.GraphModule, tuple[PassStep, ...]]:
    """The approximate passes: `gm`, behind the exact ones, with the plan's tokens leaving. original: FLOPs, for the account."""
    run = Runner("approximate", original)
    if plan.skipping:
        gm = run("insert_branches", lambda g: insert_branches(g, plan), gm)
    if plan.propagated or plan.strategy.rewrites_every_attention:
        gm = run("insert_propagation", lambda g: insert_propagation(g, plan), gm)
    return gm, tuple(run.steps)


def shortened(gm: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """What `carry_out` makes, its last pass unverified, in half the time: for graphs that are run at once and thrown away."""
    if plan.skipping:
        gm = insert_branches(gm, plan)
        if plan.propagated:
            propagate_shapes(gm, after="insert_branches")
    if plan.propagated or plan.strategy.rewrites_every_attention:
        gm = insert_propagation(gm, plan)
    return gm


@dataclass
class Runner:
    """Runs passes of one tier: verifies each, and keeps account."""

    tier: str
    original: int
    steps: list[PassStep] = field(default_factory=list)

    def __call__(
        self, name: str, rewrite: Callable[[fx.GraphModule], fx.GraphModule], gm: fx.GraphModule
    ) -> fx.GraphModule:
        result = rewrite(gm)
        if result is not gm:  # a pass with nothing to do may hand back what it got
            propagate_shapes(result, after=name)
        step = PassStep(name, self.tier, count_flops(result.graph), _operators(result.graph))
        self.steps.append(step)
        ratio = step.flops / max(self.original, 1)
        log.info("%s (%s): %d operators, %.4f of the FLOPs", name, self.tier, step.operators, ratio)
        return result


def _operators(graph: fx.Graph) -> int:
    return sum(node.op == "call_function" for node in graph.nodes)
