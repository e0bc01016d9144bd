"""Which windows are awake in a block, how they are taken out of its stream, and how they are put back.

They are put back by reading instead of writing, `where(awake, result[rank], before + share * change[cell])`: one
pointwise operator, fused with what leads out of the windows. The last term is what windows that rest get
(`resting_cells`).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import fx
from torch.ops import aten, gtp_fx  # type: ignore[import-not-found]

from gtp_fx.analysis.resting import Rest, patches_by_window
from gtp_fx.analysis.window_steps import PAD
from gtp_fx.graph.constants import Constants
from gtp_fx.passes.reduce.resting_cells import CellTables, RestingCells
from gtp_fx.strategies.sites import Emit
from gtp_fx.types.axes import Plain, TensorType, whole_size
from gtp_fx.types.layouts import convert, image_layout


class Awake(Protocol):
    """The windows that are awake, as nodes."""

    @property
    def entries(self) -> fx.Node:
        """Return the block's stream for them."""

    @property
    def tokens(self) -> int:
        """Return how many tokens each entry of its first dimension has."""

    @property
    def windows(self) -> fx.Node | None:
        """Return their rows among those of all images' windows; None where no step takes a table's entries by them."""

    def moved(self, call: Emit, target: str, value: fx.Node) -> fx.Node:
        """Insert what pads windows (`PAD`) or crops them (`CROP`)."""

    def resting(self, call: Emit) -> RestingCells:
        """Insert what takes the windows that rest, as the means of their cells."""

    def back(self, call: Emit, result: fx.Node, change: fx.Node | None, kind: TensorType) -> fx.Node:
        """Put the block's result back beside the windows that rest; return it in the type `kind`.

        change: what the cells of those change by, times the share that their tokens get of it; None for nothing.
        """


@dataclass(frozen=True)
class WholeRows:
    """Windows without padding: [images and windows, patches, features].

    rows: the whole stream by window. chosen, quiet: [B, K] and [B, P] the windows of each image that are awake, and
    those that rest.
    """

    rest: Rest
    tables: CellTables
    rows: fx.Node
    chosen: fx.Node
    quiet: fx.Node
    windows: fx.Node
    entries: fx.Node

    @classmethod
    def take(cls, call: Emit, constants: Constants, rest: Rest, resting: int, kind: TensorType) -> WholeRows:
        """Insert what chooses the windows that are awake, and takes them.

        resting: windows of each image. kind: the stream's type.
        """
        rows = convert(call, rest.stream, kind, (*rest.rows, kind[-1]))
        split = call(gtp_fx.select.default, call(gtp_fx.window_activity.default, rows, rest.windows), resting)
        chosen, quiet = (call(operator.getitem, split, half) for half in (0, 1))
        windows = call(gtp_fx.awake_rows.default, chosen, rest.windows)
        entries = call(aten.index_select.default, rows, 0, windows)
        home = np.arange(rest.tokens).reshape(rest.windows, -1)
        cells = CellTables(constants, rest, home, patches_by_window(rest.rows).flatten())
        return cls(rest, cells, rows, chosen, quiet, windows, entries)

    @property
    def tokens(self) -> int:
        return self.rest.cells.places

    def moved(self, call: Emit, target: str, value: fx.Node) -> fx.Node:
        raise AssertionError(f"windows without padding have nothing to {target}")

    def resting(self, call: Emit) -> RestingCells:
        windows = call(gtp_fx.awake_rows.default, self.quiet, self.rest.windows)
        rows = call(aten.index_select.default, self.rows, 0, windows)
        return RestingCells(windows, self.tables.pooled(call, rows), rows)

    def back(self, call: Emit, result: fx.Node, change: fx.Node | None, kind: TensorType) -> fx.Node:
        rank = call(gtp_fx.window_ranks.default, self.chosen, self.rest.windows)
        before = self.rows
        if change is not None:
            given = self.tables.given(call, change, self.quiet, self.rest.windows)
            given = call(aten.reshape.default, given, [-1, self.rest.cells.places, whole_size(kind[-1])])
            before = call(aten.add.Tensor, before, given)
        whole = _put_back(call, result, rank, before, 3)
        arranged: fx.Node = convert(call, whole, (*self.rest.rows, kind[-1]), kind)
        return arranged


@dataclass(frozen=True)
class PaddedTables:
    """What sizes alone decide where windows are padded, with A windows without padding and E with some.

    able: [A] the numbers of those without padding. patches: [A, n] of the patches that each of them holds.
    padded: [E] the numbers of the others. edge: the numbers of the patches that they hold.
    places: [T] which places of the windows that are awake hold patches. held: [S] which of the T each place holds; -1
    for padding.
    """

    able: np.ndarray
    patches: np.ndarray
    padded: np.ndarray
    edge: np.ndarray
    places: np.ndarray
    held: np.ndarray

    @classmethod
    def of(cls, rest: Rest, resting: int) -> PaddedTables:
        """Return a block's. resting: windows of each image."""
        home = patches_by_window(rest.rows)
        is_able = (home >= 0).all(axis=1)
        able, padded = np.flatnonzero(is_able), np.flatnonzero(~is_able)
        # Those without padding that are awake come first, whichever they are, then all others.
        awake = np.concatenate([home[able[resting:]], home[padded]]) >= 0
        places = np.flatnonzero(awake)
        held = np.where(awake.flatten(), awake.cumsum() - 1, -1)
        return cls(able, home[able], padded, home[padded][home[padded] >= 0], places, held)


@dataclass(frozen=True)
class PaddedWindows:
    """Windows of which some hold padding: [images, patches of the windows that are awake, features].

    patches: the whole stream, [B * N, features]. numbers: [B, T] the patches that the windows hold. tokens: T. places:
    [T] where in the windows these are. held: [S] which of them each place holds. kept: K. able: [A] the numbers of the
    windows without padding. rows: these windows, [B * A, n, features]. quiet: [B, P] which of them rest.
    """

    rest: Rest
    kept: int
    tokens: int
    tables: CellTables
    able: np.ndarray
    rows: fx.Node
    quiet: fx.Node
    patches: fx.Node
    numbers: fx.Node
    places: fx.Node
    held: fx.Node
    windows: fx.Node | None
    entries: fx.Node

    @classmethod
    def take(cls, call: Emit, constants: Constants, rest: Rest, resting: int, kind: TensorType) -> PaddedWindows:
        """Insert what chooses the windows that are awake, and takes their patches.

        resting: windows of each image. kind: the stream's type.
        """
        tables, features = PaddedTables.of(rest, resting), whole_size(kind[-1])

        def read(table: np.ndarray) -> fx.Node:
            return constants.read(table, rest.stream)

        patches = convert(call, rest.stream, kind, _flat(rest, kind))
        able = read(tables.patches)
        rows = call(gtp_fx.windows_without_padding.default, patches, able)
        split = call(gtp_fx.select.default, call(gtp_fx.window_activity.default, rows, rest.whole), resting)
        chosen, quiet = (call(operator.getitem, split, half) for half in (0, 1))
        numbers = call(gtp_fx.awake_patches.default, chosen, able, read(tables.edge))
        flat = call(aten.reshape.default, patches, [-1, features])
        taken = call(aten.index_select.default, flat, 0, call(gtp_fx.awake_rows.default, numbers, rest.tokens))
        entries = call(aten.reshape.default, taken, [-1, len(tables.places), features])
        windows = None
        if any(step.taken for step in rest.steps):
            awake = call(gtp_fx.awake_of_padded.default, chosen, read(tables.able), read(tables.padded))
            windows = call(gtp_fx.awake_rows.default, awake, rest.windows)
        kept, places, held = rest.windows - resting, read(tables.places), read(tables.held)
        cells = CellTables(constants, rest, tables.patches, np.arange(rest.tokens))
        return cls(
            rest,
            kept,
            len(tables.places),
            cells,
            tables.able,
            rows,
            quiet,
            flat,
            numbers,
            places,
            held,
            windows,
            entries,
        )

    def moved(self, call: Emit, target: str, value: fx.Node) -> fx.Node:
        if target == PAD:
            return call(gtp_fx.pad_windows.default, value, self.held, whole_size(self.rest.rows[1]))
        return call(gtp_fx.crop_windows.default, value, self.places, self.kept)

    def resting(self, call: Emit) -> RestingCells:
        quiet = call(gtp_fx.awake_rows.default, self.quiet, self.rest.whole)
        rows = call(aten.index_select.default, self.rows, 0, quiet)
        windows = None
        if any(step.taken for step in self.rest.coarse):
            read = self.tables.constants.read
            none = read(np.zeros(0, np.int64), self.rest.stream)
            all_of = call(gtp_fx.awake_of_padded.default, self.quiet, read(self.able, self.rest.stream), none)
            windows = call(gtp_fx.awake_rows.default, all_of, self.rest.windows)
        return RestingCells(windows, self.tables.pooled(call, rows), rows)

    def back(self, call: Emit, result: fx.Node, change: fx.Node | None, kind: TensorType) -> fx.Node:
        features = whole_size(kind[-1])
        rank = call(gtp_fx.window_ranks.default, self.numbers, self.rest.tokens)
        before = self.patches
        if change is not None:
            before = call(aten.add.Tensor, before, self.tables.given(call, change, self.quiet, self.rest.whole))
        whole = _put_back(call, call(aten.reshape.default, result, [-1, features]), rank, before, 2)
        whole = call(aten.reshape.default, whole, [-1, self.rest.tokens, features])
        arranged: fx.Node = convert(call, whole, _flat(self.rest, kind), kind)
        return arranged


def _put_back(call: Emit, result: fx.Node, rank: fx.Node, before: fx.Node, dimensions: int) -> fx.Node:
    """Insert the rows of `result` where their rank says so, and those of `before` where it is -1."""
    spread = call(gtp_fx.rows_at.default, result, rank)
    is_awake = call(aten.reshape.default, call(aten.ge.Scalar, rank, 0), [-1] + [1] * (dimensions - 1))
    return call(aten.where.self, is_awake, spread, before)


def _flat(rest: Rest, kind: TensorType) -> TensorType:
    """Return the layout [images, patches row by row, features]."""
    images = tuple(f for dim in kind for f in dim if isinstance(f, Plain) and f.images) or (Plain(1),)
    return images, tuple(f for dim in image_layout(rest.rows)[1:] for f in dim), kind[-1]
