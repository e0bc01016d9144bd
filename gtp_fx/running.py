"""Running passes: each verified, each accounted for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import fx

from gtp_fx.cost.count import count_flops
from gtp_fx.journal import Journal
from gtp_fx.passes.insert_branches import insert_branches
from gtp_fx.passes.insert_propagation import insert_propagation
from gtp_fx.plan import Plan
from gtp_fx.report import PassStep
from gtp_fx.shapes import propagate_shapes

log = logging.getLogger(__name__)


Rewrite = Callable[[fx.GraphModule], fx.GraphModule]


def carry_out(
    gm: fx.GraphModule, plan: Plan, original: int, journal: Journal
) -> tuple[fx.GraphModule, tuple[PassStep, ...]]:
    """The approximate passes: `gm`, behind the exact ones, with the plan's tokens leaving. original: FLOPs, for the account."""
    run = Runner("approximate", original, journal)
    for name, rewrite in _approximate(plan):
        gm = run(name, rewrite, gm)
    return gm, tuple(run.steps)


def shortened(gm: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """What `carry_out` makes, its last pass unverified, in half the time: for graphs that are run at once and thrown away."""
    passes = _approximate(plan)
    for left, (name, rewrite) in zip(reversed(range(len(passes))), passes, strict=True):
        gm = rewrite(gm)
        if left:  # the next one reads shapes
            propagate_shapes(gm, after=name)
    return gm


def _approximate(plan: Plan) -> list[tuple[str, Rewrite]]:
    """The passes that the plan needs, in order."""
    passes: list[tuple[str, Rewrite]] = []
    if plan.skipping:
        passes.append(("insert_branches", lambda gm: insert_branches(gm, plan)))
    if plan.propagated or plan.strategy.rewrites_every_attention:
        passes.append(("insert_propagation", lambda gm: insert_propagation(gm, plan)))
    return passes


@dataclass
class Runner:
    """Runs passes of one tier, but for disabled ones: verifies each, and keeps account."""

    tier: str
    original: int
    journal: Journal
    disabled: tuple[str, ...] = ()
    steps: list[PassStep] = field(default_factory=list)

    def __call__(self, name: str, rewrite: Rewrite, gm: fx.GraphModule) -> fx.GraphModule:
        if name in self.disabled:
            log.info("%s: disabled", name)
            return gm
        result = rewrite(gm)
        if result is not gm:  # a pass with nothing to do may hand back what it got
            propagate_shapes(result, after=name)
        step = PassStep(name, self.tier, count_flops(result.graph), _operators(result.graph))
        self.steps.append(step)
        ratio = step.flops / max(self.original, 1)
        self.journal.page(name, result)
        log.info("%s (%s): %d operators, %.4f of the FLOPs", name, self.tier, step.operators, ratio)
        return result


def _operators(graph: fx.Graph) -> int:
    return sum(node.op == "call_function" for node in graph.nodes)
