"""Which windows are awake in a block, how they are taken out of its stream, and how they are put back.

They are put back by reading instead of writing, `where(awake, result[rank], before)`: one pointwise operator, fused
with what leads out of the windows.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Protocol

from torch import fx
from torch.ops import aten, gtp_fx  # type: ignore[import-not-found]

from gtp_fx.analysis.resting import Rest
from gtp_fx.analysis.window_steps import PAD
from gtp_fx.strategies.protocol import Emit
from gtp_fx.types.axes import Plain, TensorType, whole_size
from gtp_fx.types.layouts import by_window, convert, image_layout


class Awake(Protocol):
    """The windows that are awake, as nodes."""

    @property
    def entries(self) -> fx.Node:
        """Return the block's stream for them."""

    @property
    def windows(self) -> fx.Node:
        """Return their rows among those of all images' windows."""

    def moved(self, call: Emit, target: str, value: fx.Node) -> fx.Node:
        """Insert what pads windows (`PAD`) or crops them (`CROP`)."""

    def back(self, call: Emit, result: fx.Node, kind: TensorType) -> fx.Node:
        """Put the block's result back beside the windows that rest; return it in the type `kind`."""


@dataclass(frozen=True)
class WholeRows:
    """Windows without padding: [images and windows, patches, features].

    rows: the whole stream by window. chosen: [B, K] the windows of each image that are awake.
    """

    rest: Rest
    rows: fx.Node
    chosen: fx.Node
    windows: fx.Node
    entries: fx.Node

    @classmethod
    def take(cls, call: Emit, rest: Rest, rows: fx.Node, resting: int) -> WholeRows:
        """Insert what chooses the windows that are awake, and takes them. resting: of each image."""
        split = call(gtp_fx.select.default, call(gtp_fx.window_activity.default, rows, rest.windows), resting)
        chosen = call(operator.getitem, split, 0)
        windows = call(gtp_fx.awake_rows.default, chosen, rest.windows)
        return cls(rest, rows, chosen, windows, call(aten.index_select.default, rows, 0, windows))

    def moved(self, call: Emit, target: str, value: fx.Node) -> fx.Node:
        raise AssertionError(f"windows without padding have nothing to {target}")

    def back(self, call: Emit, result: fx.Node, kind: TensorType) -> fx.Node:
        rank = call(gtp_fx.window_ranks.default, self.chosen, self.rest.windows)
        whole = _put_back(call, result, rank, self.rows, 3)
        arranged: fx.Node = convert(call, whole, (*self.rest.rows, kind[-1]), kind)
        return arranged


@dataclass(frozen=True)
class PaddedWindows:
    """Windows of which some hold padding: [images, patches of the windows that are awake, features].

    patches: the whole stream, [B * N, features]. held: [B, T] the patches that the windows hold. places: [T] where in
    the windows these are. kept: K.
    """

    rest: Rest
    kept: int
    patches: fx.Node
    held: fx.Node
    places: fx.Node
    windows: fx.Node
    entries: fx.Node

    @classmethod
    def take(cls, call: Emit, rest: Rest, resting: int, stream: fx.Node, kind: TensorType) -> PaddedWindows:
        """Insert what chooses the windows that are awake, and takes their patches.

        stream: of type `kind`. resting: windows of each image.
        """
        home = _home(call, rest, stream)
        patches = convert(call, stream, kind, _flat(rest, kind))
        able = call(gtp_fx.windows_without_padding.default, patches, home, rest.whole)
        activity = call(gtp_fx.window_activity.default, able, rest.whole)
        chosen = call(gtp_fx.awake_of_padded.default, activity, home, rest.whole, resting)
        held = rest.tokens - resting * whole_size(rest.rows[1])
        places = call(gtp_fx.places_of_patches.default, home, rest.whole, resting, held)
        numbers = call(gtp_fx.awake_patches.default, home, chosen, places)
        flat = call(aten.reshape.default, patches, [-1, whole_size(kind[-1])])
        taken = call(aten.index_select.default, flat, 0, call(gtp_fx.awake_rows.default, numbers, rest.tokens))
        entries = call(aten.reshape.default, taken, [-1, held, whole_size(kind[-1])])
        windows = call(gtp_fx.awake_rows.default, chosen, rest.windows)
        return cls(rest, rest.windows - resting, flat, numbers, places, windows, entries)

    def moved(self, call: Emit, target: str, value: fx.Node) -> fx.Node:
        if target == PAD:
            return call(gtp_fx.pad_windows.default, value, self.places, self.kept, whole_size(self.rest.rows[1]))
        return call(gtp_fx.crop_windows.default, value, self.places, self.kept)

    def back(self, call: Emit, result: fx.Node, kind: TensorType) -> fx.Node:
        features = whole_size(kind[-1])
        rank = call(gtp_fx.window_ranks.default, self.held, self.rest.tokens)
        whole = _put_back(call, call(aten.reshape.default, result, [-1, features]), rank, self.patches, 2)
        whole = call(aten.reshape.default, whole, [-1, self.rest.tokens, features])
        arranged: fx.Node = convert(call, whole, _flat(self.rest, kind), kind)
        return arranged


def _put_back(call: Emit, result: fx.Node, rank: fx.Node, before: fx.Node, dimensions: int) -> fx.Node:
    """Insert the rows of `result` where their rank says so, and those of `before` where it is -1."""
    spread = call(aten.index_select.default, result, 0, call(aten.clamp_min.default, rank, 0))
    is_awake = call(aten.reshape.default, call(aten.ge.Scalar, rank, 0), [-1] + [1] * (dimensions - 1))
    return call(aten.where.self, is_awake, spread, before)


def _flat(rest: Rest, kind: TensorType) -> TensorType:
    """Return the layout [images, patches row by row, features]."""
    images = tuple(f for dim in kind for f in dim if isinstance(f, Plain) and f.images) or (Plain(1),)
    return images, tuple(f for dim in image_layout(rest.rows)[1:] for f in dim), kind[-1]


def _home(call: Emit, rest: Rest, like: fx.Node) -> fx.Node:
    """Insert which patch each place of an image's windows holds, [windows, places]; -1 for padding."""
    feature = (Plain(1),)
    image = image_layout(rest.rows)
    numbers = call(gtp_fx.grid_numbers.default, [whole_size(dim) for dim in image[1:]], like)
    placed = convert(call, numbers, (*image, feature), by_window(rest.rows, feature))
    return call(gtp_fx.homes.default, placed)
