"""Approximate: whole windows rest. A block runs for the most active windows of each image, and for cells of the others.

For each block whose site in the plan is one where windows rest:
  1. Its stream is arranged by window, [images and windows, tokens, features].
  2. The windows whose tokens differ most from their mean are taken out, equally many of each image.
  3. The block's nodes run on these: what rearranges tokens is gone, masks by window are taken for them.
  4. Of the windows that rest, the mean token of each cell is taken, and the same nodes run on these few, among which
     they attend, or to all patches of their window, as the strategy says. Where they attend among themselves, what
     works on each token alone runs once, for the tokens of 3. and for cells.
  5. All are put back, and return to the stream's layout. A token of a window that rests gets a share of what its cell
     has changed by, as the strategy says.

Where windows are padded, 1. and 2. take the patches of the windows that are awake instead; they get their padding again
for what runs on windows.
"""

from __future__ import annotations

import math
import operator
from fractions import Fraction

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.analysis.patch_keys import PatchKeys
from gtp_fx.analysis.resting import Rest
from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.graph import edit
from gtp_fx.graph.constants import Constants
from gtp_fx.graph.symbols import is_symbolic, shape_of
from gtp_fx.graph.verify import propagate_shapes
from gtp_fx.passes.exact.split_projections import keep_rows_read
from gtp_fx.passes.reduce.awake_windows import Awake, PaddedWindows, WholeRows
from gtp_fx.passes.reduce.joint_rows import JointRun
from gtp_fx.passes.reduce.resting_cells import Middles, RestingCells
from gtp_fx.passes.reduce.run_step import run_step
from gtp_fx.plan.plan import Plan
from gtp_fx.strategies import Strategy
from gtp_fx.strategies.sites import Attention, Emit
from gtp_fx.types.axes import whole_size
from gtp_fx.types.infer import TypeOf, type_of_copies


def rest_windows(gm: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """Return a copy of `gm`, whose blocks are marked, in which the plan's windows rest."""
    typed = typed_graph(gm.graph)
    found, typing = typed.rests, typed.whole
    gm, copies = edit.copy_with_nodes(gm)
    type_of = type_of_copies(typing, copies)
    constants = Constants(gm)
    rests = {number: rest.copied(copies) for number, rest in found.items() if isinstance(rest, Rest)}
    # From the last to the first: what a later block reads of an earlier one's result is replaced with that result.
    partly_read: list[fx.Node] = []
    for number, resting in sorted(plan.resting.items(), reverse=True):
        partly_read += _let_rest(gm.graph, rests[number], resting, plan.strategy, type_of, constants)
    edit.finish(gm, draws=False)
    if partly_read:
        propagate_shapes(gm, after=rest_windows.__name__)
        for linear in partly_read:
            keep_rows_read(gm.graph, linear)
    return edit.finish(gm, draws=False)


def _let_rest(
    graph: fx.Graph, rest: Rest, resting: int, strategy: Strategy, type_of: TypeOf, constants: Constants
) -> list[fx.Node]:
    """Rewrite one block. resting: how many windows of each image rest.

    Returns projections of which not all rows are read.
    """
    share = strategy.rest_share
    stream, result = type_of(rest.stream), type_of(rest.result)
    call = edit.Emitter(graph, like=rest.steps[0].node)
    with graph.inserting_before(rest.stream.next):
        _reread_sizes(call, rest)
    for node in rest.made:
        edit.set_args(node, (rest.stream, *node.args[1:]))
    with graph.inserting_before(rest.result):
        taken = PaddedWindows if rest.padded else WholeRows
        awake: Awake = taken.take(call, constants, rest, resting, stream)
        change, partly_read = None, list[fx.Node]()
        if not (resting and share):
            made = _awake(graph, rest, awake)
        else:
            cells, at = awake.resting(call), Middles(rest, constants)
            if strategy.rest_keys == "patches":
                made = _awake(graph, rest, awake)
                of_cells, partly_read = _on_patches(graph, rest, cells, at)
            else:
                made, of_cells = JointRun(graph, rest, awake, cells, at).run()
            change = call(aten.sub.Tensor, of_cells, cells.entries)
            change = change if share == 1 else call(aten.mul.Tensor, change, share)
        whole = awake.back(call, made, change, result)
    edit.replace(rest.result, whole)
    return partly_read


def _awake(graph: fx.Graph, rest: Rest, awake: Awake) -> fx.Node:
    """Insert what the block does for windows that are awake; return its result for them."""
    fewer = {rest.stream: awake.entries}
    for step in rest.steps:
        fewer[step.node] = run_step(graph, step, fewer, awake)
    return fewer[rest.result]


def _on_patches(graph: fx.Graph, rest: Rest, resting: RestingCells, at: Middles) -> tuple[fx.Node, list[fx.Node]]:
    """Insert what the block does for the cells of windows that rest, where these attend to all patches of their window.

    Returns its result for the cells, and projections of which only a part is read.
    """
    keys = rest.patch_keys
    assert isinstance(keys, PatchKeys), "the plan lets other windows rest"
    patches, cells = {rest.stream: resting.rows}, {rest.stream: resting.entries}
    for step in rest.steps:
        if step.node in keys.of_patches:
            patches[step.node] = run_step(graph, step, patches, resting)
    for step in rest.coarse:
        if step.node is keys.attends.node:
            operands = Attention.of(step.node)
            given = {**cells, operands.k: patches[operands.k], operands.v: patches[operands.v]}
            cells[step.node] = run_step(graph, keys.attends, given, resting, at)
        elif step.node in keys.of_cells:
            cells[step.node] = run_step(graph, step, cells, resting, at)
    of_both = (patches, keys.rows_of_patches), (cells, keys.rows_of_cells)
    return cells[rest.result], [made[node] for made, rows in of_both for node in rows]


def _reread_sizes(call: Emit, rest: Rest) -> None:
    """Let what reads the size of a value inside read it off the stream: its first, or how many windows there are."""
    shape = shape_of(rest.stream)
    sizes: dict[int, fx.Node] = {}
    for node in rest.sizes:
        read = shape_of(node.args[0])[node.args[1]]  # type: ignore[arg-type, index]
        if read not in sizes:
            sizes[read] = call(aten.sym_size.int, rest.stream, 0) if read == shape[0] else _windows(call, rest)
        edit.replace(node, sizes[read])


def _windows(call: Emit, rest: Rest) -> fx.Node:
    """Insert the number of windows of all images, as so many times the stream's sizes that are known in a run alone."""
    shape = shape_of(rest.stream)
    first, *others = [dim for dim, size in enumerate(shape) if is_symbolic(size)] or [0]
    count = call(aten.sym_size.int, rest.stream, first)
    for dim in others:
        count = call(operator.mul, count, call(aten.sym_size.int, rest.stream, dim))
    each = Fraction(whole_size(rest.rows[0]), math.prod(shape[dim] for dim in (first, *others)))
    count = call(operator.mul, count, each.numerator)
    return count if each.denominator == 1 else call(operator.floordiv, count, each.denominator)
