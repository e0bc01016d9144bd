"""Windows that rest, as nodes: their cells, what these read of tables, and what their tokens get of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import fx
from torch.ops import aten, gtp_fx  # type: ignore[import-not-found]

from gtp_fx.analysis.resting import Rest
from gtp_fx.analysis.window_steps import Sampled
from gtp_fx.graph.constants import Constants
from gtp_fx.graph.symbols import shape_of
from gtp_fx.strategies.sites import Attention, Emit


@dataclass(frozen=True)
class RestingCells:
    """The windows that rest: [images and windows, cells, features].

    windows: as in `Awake`. rows: [images and windows, patches, features].
    """

    windows: fx.Node | None
    entries: fx.Node
    rows: fx.Node


@dataclass(frozen=True)
class CellTables:
    """What sizes alone decide of the cells of a block's windows.

    patches: [A, n] the numbers of the tokens in each window that can rest, in the order of an image's tokens.
    on_grid: the number of each of these tokens on the image's grid, row by row.
    """

    constants: Constants
    rest: Rest
    patches: np.ndarray
    on_grid: np.ndarray

    def pooled(self, call: Emit, rows: fx.Node) -> fx.Node:
        """Insert the means of the cells of windows [R, n, features]."""
        members = self.constants.read(self.rest.cells.members(), self.rest.stream)
        return call(gtp_fx.pool_cells.default, rows, members)

    def given(self, call: Emit, change: fx.Node, quiet: fx.Node, windows: int) -> fx.Node:
        """Insert what each token of all images gets of its cell's change, [B * T, features].

        What it is for tokens that are awake doesn't matter. windows: how many of an image can rest.
        """
        window, cell = np.zeros(self.rest.tokens, np.int64), np.full(self.rest.tokens, -1)
        for number, tokens in enumerate(self.patches):
            window[tokens], cell[tokens] = number, self.rest.cells.of_places()
        tables = window, cell, self.on_grid
        read = [self.constants.read(table, self.rest.stream) for table in tables]
        rank = call(gtp_fx.window_ranks.default, quiet, windows)
        sizes = windows, self.rest.cells.count, list(self.rest.sides)
        numbers = call(gtp_fx.cell_numbers.default, rank, *read, *sizes)
        flat = call(aten.reshape.default, change, [-1, shape_of(self.rest.stream)[-1]])
        return call(aten.index_select.default, flat, 0, numbers)


@dataclass(frozen=True)
class Middles:
    """What the cells of a window read of values that have an entry for each place."""

    rest: Rest
    constants: Constants

    def read(self, call: Emit, value: fx.Node, sampled: Sampled) -> fx.Node:
        """Insert the entries of a value at the cells' middles."""
        table = self.constants.read(self.rest.cells.middles(sampled.side), self.rest.stream)
        return call(aten.index_select.default, value, sampled.dim, table)

    def weighed(self, call: Emit, attention: fx.Node) -> None:
        """Let keys that are cells of several sizes count as often as they have places."""
        if self.rest.cells.even:
            return
        operands = Attention.of(attention)
        bias = [] if operands.bias is None else [operands.bias]
        with attention.graph.inserting_before(attention):
            members = self.constants.read(self.rest.cells.members(), self.rest.stream)
            mask = call(gtp_fx.cell_bias.default, members, operands.q, *bias)
        attention.args = (*attention.args[:3], mask, *attention.args[4:])
        attention.kwargs = {name: value for name, value in attention.kwargs.items() if name != "attn_mask"}
