"""Resting: blocks that some windows can pass over as a whole, and what each node does for the others.

    x ─┬─ norm ─ roll ─ windows ─ attention ─ back ─┬─ add ─┬─ norm ─ MLP ─┬─ add
       └────────────────────────────────────────────┘       └──────────────┘

    x ── windows ─┬─ awake ───────── norm ─ attention ─ add ─ norm ─ MLP ─ add ───────────────────┬─ back
                  ├─ rest ── cells ─ norm ─ attention ─ add ─ norm ─ MLP ─ add ─ change of each ──┤
                  └───────────────────────────────────────────────────────────────────────────────┘

Everything between the stream and the block's last add has to compute each window from that window alone, which types
show node by node (`window_walk`).

Where the grid is padded, so that windows divide it, only windows without padding rest. Those at its edge are always
awake: attention runs on their padding, as in the original, and what follows it on their patches alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from torch import fx

from gtp_fx.analysis.blocks import AttentionBlock
from gtp_fx.analysis.coarse_steps import cells_of, coarse_steps
from gtp_fx.analysis.joint_steps import joint_steps
from gtp_fx.analysis.patch_keys import PatchKeys, find_patch_keys
from gtp_fx.analysis.window_cells import Cells
from gtp_fx.analysis.window_forms import Forms, NoRest
from gtp_fx.analysis.window_steps import Step
from gtp_fx.analysis.window_walk import last_add, nodes_between, read_outside, steps_of
from gtp_fx.graph.operators import ATTENTION
from gtp_fx.graph.symbols import shape_of
from gtp_fx.types.axes import Plain, TensorType, token_axes, whole_size
from gtp_fx.types.grids import GridAxis
from gtp_fx.types.infer import WholeTyping
from gtp_fx.types.layouts import base_of, grid_of, made_from
from gtp_fx.types.merging import split_tokens


@dataclass(frozen=True)
class Rest:
    """A block whose windows can rest.

    stream: what it begins with.
    result: its last add.
    steps: what its nodes do for fewer windows, in order; the last one is the result's.
    coarse: what they do for the cells of windows that rest.
    joint: the nodes that run once for both, on rows.
    patch_keys: what of them runs on cells where these attend to all of their window's patches, or why they can't.
    cells: of a window.
    by_window: those of its nodes that run on windows, with their padding; the others run on patches.
    rows: the layout by window, [images and windows, patches]; features follow.
    windows: of an image.
    whole: how many of them hold no padding, and can rest.
    sizes: nodes that read the number of all windows, or the stream's first size, off a value inside.
    made: nodes that make a new tensor and take dtype and device from a value inside, those of the stream.
    """

    stream: fx.Node
    result: fx.Node
    steps: tuple[Step, ...]
    coarse: tuple[Step, ...]
    joint: frozenset[fx.Node]
    patch_keys: PatchKeys | NoRest
    cells: Cells
    by_window: frozenset[fx.Node]
    rows: TensorType
    windows: int
    whole: int
    sizes: tuple[fx.Node, ...] = ()
    made: tuple[fx.Node, ...] = ()

    @property
    def inside(self) -> tuple[fx.Node, ...]:
        """The block's nodes."""
        return tuple(step.node for step in self.steps)

    @property
    def tokens(self) -> int:
        """The number of patches of an image."""
        return math.prod(base_of(grid_of(self.rows)).shape)

    @property
    def sides(self) -> tuple[int, ...]:
        """The sides of an image's grid of patches."""
        return made_from(grid_of(self.rows))[-1].shape

    def share(self, node: fx.Node) -> Fraction:
        """Return the share of a node's work that one window without padding has, of all windows of an image."""
        return Fraction(1, self.windows) if node in self.by_window else Fraction(whole_size(self.rows[1]), self.tokens)

    def coarse_share(self, node: fx.Node, keys: str) -> Fraction:
        """Return the share of a node's work that is done for one window that rests, of all windows of an image.

        keys: what its cells attend to, "cells" or "patches".
        """
        fewer = Fraction(self.cells.count, self.cells.places)
        if keys == "patches":
            assert isinstance(self.patch_keys, PatchKeys), "the plan lets other windows rest"
            return self.share(node) * self.patch_keys.share(node, fewer)
        return self.share(node) * (fewer**2 if node.target in ATTENTION else fewer)

    @property
    def padded(self) -> bool:
        """Whether some windows hold padding."""
        return self.whole < self.windows

    def copied(self, at: Mapping[fx.Node, fx.Node]) -> Rest:
        """Return this block in a copy of the graph. at: each node's copy."""
        steps, coarse = (tuple(step.copied(at) for step in steps) for steps in (self.steps, self.coarse))
        sizes, made = (tuple(at[node] for node in nodes) for nodes in (self.sizes, self.made))
        by_window, joint = (frozenset(at[node] for node in nodes) for nodes in (self.by_window, self.joint))
        keys = self.patch_keys.copied(at) if isinstance(self.patch_keys, PatchKeys) else self.patch_keys
        ends = replace(self, stream=at[self.stream], result=at[self.result], joint=joint, patch_keys=keys)
        return replace(ends, steps=steps, coarse=coarse, by_window=by_window, sizes=sizes, made=made)


def find_rest(block: AttentionBlock, typing: WholeTyping) -> Rest:
    """Find what fewer windows do in a block whose tokens can skip a branch.

    Raises NoRest, with the reason.
    """
    branch, stream = block.branch, block.stream
    if branch is None or stream is None:
        raise NoRest("it has no branch that tokens can skip")
    rows = branch.scores
    windows = tuple(f for f in rows[0] if not isinstance(f, Plain))
    if branch.attentions < 2:
        raise NoRest("it attends over its whole grid")
    beside = any(axis.prefix or axis.suffix for axis in token_axes((*rows, *branch.rows)))
    if branch.cells or beside or any(branch.apart):
        raise NoRest("its windows hold more than their own patches")
    if rows[0][-len(windows) :] != windows:
        raise NoRest("the windows of an image don't stand together")
    whole = whole_windows(rows)
    if whole < 2:
        raise NoRest(f"only {whole} of its windows holds no padding, and others are always awake")
    result = last_add(branch.parts[-1].result)
    if result.meta["val"].dtype != stream.meta["val"].dtype:
        raise NoRest("its end is of another dtype than its stream")
    nodes = nodes_between(stream, result, typing)
    sizes, made = read_outside(nodes, stream.meta["val"].dtype)
    if block.attention not in nodes or len([n for n in nodes if n.target in ATTENTION]) > 1:
        raise NoRest("its attention doesn't stand alone between its stream and its end")
    forms = Forms(typing, rows)
    steps, cells = steps_of(nodes, stream, forms), cells_of(forms)
    coarse = coarse_steps(steps, forms, cells)
    known = (whole_size(rows[0]), shape_of(stream)[0])
    if any(shape_of(n.args[0])[n.args[1]] not in known for n in sizes):  # type: ignore[arg-type, index]
        raise NoRest("something reads the size of a value inside it")
    count = math.prod(f.whole_size for f in windows)
    by_window = frozenset(node for node in nodes if forms.of[node] is not None)
    keys = find_patch_keys(block.attention, nodes, coarse)
    joint, tables = joint_steps(steps, forms), (tuple(sizes), tuple(made))
    return Rest(stream, result, steps, coarse, joint, keys, cells, by_window, rows, count, whole, *tables)


def whole_windows(rows: TensorType) -> int:
    """Return how many windows of an image hold no padding. rows: the layout by window."""
    if all(grid.inside is None for grid in made_from(grid_of(rows))):
        return math.prod(f.whole_size for f in split_tokens(rows[0]) if isinstance(f, GridAxis))
    return int((patches_by_window(rows) >= 0).all(axis=1).sum())


def patches_by_window(rows: TensorType) -> np.ndarray:
    """Return the number of the patch in each place of an image's padded windows, [windows, places]; -1 for padding.

    rows: the layout by window.
    """
    below, *made = made_from(grid_of(rows))[::-1]
    patch = np.arange(math.prod(below.shape)).reshape(below.shape)
    for grid in made:
        if grid.shift:
            patch = np.roll(patch, grid.shift, tuple(range(patch.ndim)))
        elif grid.flipped:
            patch = np.flip(patch, grid.flipped)
        else:
            more = [(0, big - small) for big, small in zip(grid.shape, patch.shape, strict=True)]
            patch = np.pad(patch, more, constant_values=-1)
    factors = [f for dim in rows for f in split_tokens(dim) if isinstance(f, GridAxis)]
    places = np.ix_(*(f.stride * np.arange(f.whole_size) for f in factors))
    at = [sum(place for f, place in zip(factors, places, strict=True) if f.side == side) for side in range(patch.ndim)]
    by_window: np.ndarray = patch[tuple(at)].reshape(-1, whole_size(rows[1]))
    return by_window
