"""A block's run for windows that are awake and for the cells of the others, on joint rows where they do the same."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.analysis.resting import Rest
from gtp_fx.analysis.window_steps import Step
from gtp_fx.graph import edit
from gtp_fx.graph.operators import ATTENTION
from gtp_fx.graph.symbols import shape_of
from gtp_fx.passes.reduce.awake_windows import Awake
from gtp_fx.passes.reduce.resting_cells import Middles, RestingCells
from gtp_fx.passes.reduce.run_step import run_step
from gtp_fx.strategies.sites import Emit

_LAST = 2**63 - 1


@dataclass(frozen=True)
class _Rows:
    """A value of all rows, [rows, features]: those of windows that are awake first, then cells.

    awake: how many are of the former, as a node.
    """

    value: fx.Node
    awake: fx.Node


@dataclass
class JointRun:
    """The values of a block: apart, for windows that are awake and for cells, or joint, or both once they are read so.

    awake, resting: the windows. at: where cells read tables.
    """

    graph: fx.Graph
    rest: Rest
    awake: Awake
    resting: RestingCells
    at: Middles
    of_awake: dict[fx.Node, fx.Node] = field(default_factory=dict)
    of_cells: dict[fx.Node, fx.Node] = field(default_factory=dict)
    joint: dict[fx.Node, _Rows] = field(default_factory=dict)

    def run(self) -> tuple[fx.Node, fx.Node]:
        """Insert the block's steps; return its result for windows that are awake, and for cells."""
        self.of_awake[self.rest.stream], self.of_cells[self.rest.stream] = self.awake.entries, self.resting.entries
        for step, coarse in zip(self.rest.steps, self.rest.coarse, strict=True):
            own = [n for n in step.node.all_input_nodes if n in self.joint or n in self.of_awake]
            if step.node in self.rest.joint:
                self._on_rows(step, own)
            else:
                self._apart(step, coarse, own)
        self._part(self.rest.result)
        return self.of_awake[self.rest.result], self.of_cells[self.rest.result]

    def _on_rows(self, step: Step, own: list[fx.Node]) -> None:
        """Insert a step once, for all rows."""
        given = {operand: self._join(operand, step.node) for operand in own}
        first = given[own[0]]
        if step.target is None:  # rows are in order
            self.joint[step.node] = first
            return
        rows = {operand: given[operand].value for operand in own}
        self.joint[step.node] = _Rows(run_step(self.graph, step, rows, self.awake), first.awake)

    def _apart(self, step: Step, coarse: Step, own: list[fx.Node]) -> None:
        """Insert a step for windows that are awake, and for cells."""
        for operand in own:
            self._part(operand)
        self.of_awake[step.node] = run_step(self.graph, step, self.of_awake, self.awake)
        self.of_cells[step.node] = run_step(self.graph, coarse, self.of_cells, self.resting, self.at)
        if coarse.target in ATTENTION:
            self.at.weighed(edit.Emitter(self.graph, like=step.node), self.of_cells[step.node])

    def _join(self, value: fx.Node, reader: fx.Node) -> _Rows:
        """Return a value's rows; insert them, with the origin of what reads them first."""
        if value not in self.joint:
            call: Emit = edit.Emitter(self.graph, like=reader)
            features = shape_of(value)[-1]
            both = [call(aten.reshape.default, of[value], [-1, features]) for of in (self.of_awake, self.of_cells)]
            rows = call(aten.cat.default, both)
            self.joint[value] = _Rows(rows, call(aten.sym_size.int, both[0], 0))
        return self.joint[value]

    def _part(self, value: fx.Node) -> None:
        """Insert a joint value's two parts, if they aren't there."""
        if value in self.of_awake:
            return
        call: Emit = edit.Emitter(self.graph, like=value)
        rows, features = self.joint[value], shape_of(value)[-1]
        awake = call(aten.slice.Tensor, rows.value, 0, 0, rows.awake)
        cells = call(aten.slice.Tensor, rows.value, 0, rows.awake, _LAST)
        # What runs on windows has their padding.
        tokens = self.rest.cells.places if value in self.rest.by_window else self.awake.tokens
        self.of_awake[value] = call(aten.reshape.default, awake, [-1, tokens, features])
        self.of_cells[value] = call(aten.reshape.default, cells, [-1, self.rest.cells.count, features])
