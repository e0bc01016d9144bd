"""What one node of a block does for some of its windows, as nodes."""

from __future__ import annotations

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.analysis.window_steps import CROP, PAD, Step
from gtp_fx.graph import edit
from gtp_fx.passes.reduce.awake_windows import Awake
from gtp_fx.passes.reduce.resting_cells import Middles, RestingCells
from gtp_fx.strategies.sites import Emit


def run_step(
    graph: fx.Graph, step: Step, fewer: dict[fx.Node, fx.Node], taken: Awake | RestingCells, at: Middles | None = None
) -> fx.Node:
    """Insert what a node does for some of the windows; return it.

    fewer: the block's values for these windows. taken: the windows. at: for cells, where they read tables.
    """
    if step.target is None or (step.target in (PAD, CROP) and isinstance(taken, RestingCells)):
        return fewer[step.args[0]]  # windows that rest have no padding
    call: Emit = edit.Emitter(graph, like=step.node)
    if step.target in (PAD, CROP):
        assert not isinstance(taken, RestingCells)
        return taken.moved(call, step.target, fewer[step.args[0]])
    given = dict(fewer)
    for operand, shape in step.reshaped:
        given[operand] = call(aten.reshape.default, operand, list(shape))
    for operand, dim in step.taken:
        given[operand] = call(aten.index_select.default, operand, dim, taken.windows)
    for sampled in step.sampled:
        assert at is not None
        given[sampled.operand] = at.read(call, given.get(sampled.operand, sampled.operand), sampled)
    node = call(step.target, *fx.map_arg(step.args, lambda n: given.get(n, n)))
    node.kwargs = fx.map_arg(dict(step.kwargs), lambda n: given.get(n, n))
    return node
