"""Where the values of a block have its windows, so that it can run for some of them alone.

A value is *tokens* where all its dimensions but features are images and patches, in whatever arrangement, and *by
window* where images and windows are dimensions next to each other, a `Run`. Where windows are padded, what is between
the operator that pads them and the one that crops them is *padded*, [windows, patches and padding, features].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import fx

from gtp_fx.errors import NotApplicable
from gtp_fx.graph.nodes import operator_name
from gtp_fx.types.axes import Dim, Factor, Plain, TensorType, is_plain, whole_size
from gtp_fx.types.grids import GridAxis
from gtp_fx.types.infer import WholeTyping
from gtp_fx.types.layouts import NoLayout, base_of, convert, grid_of, made_from
from gtp_fx.types.merging import split_tokens

PADDED = "padded"
"""Form of a value whose dimensions but features are all places of the windows, padding among them, in any order."""


class NoRest(NotApplicable):
    """Raised where the windows of a block can't rest; the message is the reason that a user reads."""


@dataclass(frozen=True)
class Run:
    """The dimensions of a value by window that are images and windows: `length` of them from `at` on.

    shared: how many entries the last of them has for each window, where heads are merged with windows.
    """

    at: int
    length: int
    shared: int = 1

    def dim(self, own: int) -> int:
        """Return the number of a dimension where the run is one dimension. Raises NoRest for one in the run."""
        if own < self.at:
            return own
        if own < self.at + self.length:
            raise NoRest("an operator inside it works across windows")
        return own - self.length + 1


Form: TypeAlias = Run | str | None
"""Where a value has its windows; None for tokens, `PADDED` for padded ones."""


@dataclass
class Forms:
    """What is known of a block's values, in whose graph order they are looked at.

    typing: types with every token in place.
    rows: the layout by window.
    of: the form of every value so far, the block's stream among them.
    """

    typing: WholeTyping
    rows: TensorType
    of: dict[fx.Node, Form] = field(default_factory=dict)

    @property
    def padded(self) -> bool:
        """Whether windows hold padding."""
        return _holds_padding(self.rows)

    @property
    def of_rows(self) -> Form:
        """The form of a value by window while it is still [windows, places, features]."""
        return PADDED if self.padded else None

    def is_tokens(self, node: fx.Node) -> bool:
        """Return whether a value's dimensions are images and all patches, in any arrangement, then features."""
        kind = self.typing.type(node)
        if not _is_of_tokens(kind):
            return False
        try:
            if _holds_padding(kind):
                return False
            convert(_nowhere, None, kind, (*self.rows, kind[-1]))
            convert(_nowhere, None, (*self.rows, kind[-1]), kind)
        except NoLayout:
            return False
        return True

    def is_padded(self, node: fx.Node) -> bool:
        """Return whether they are images and all places of padded windows, or some of the padding is cropped."""
        kind = self.typing.type(node)
        if not self.padded or not _is_of_tokens(kind):
            return False
        try:
            grid = grid_of(kind)
        except NoLayout:
            return False
        places = math.prod(f.whole_size for dim in kind for f in split_tokens(dim) if isinstance(f, GridAxis))
        of_these = places == math.prod(grid.shape) and base_of(grid) == base_of(grid_of(self.rows))
        return of_these and _holds_padding(kind)

    def own(self, node: fx.Node) -> list[fx.Node]:
        """Return the operands that are values of the block."""
        return [operand for operand in node.all_input_nodes if operand in self.of]

    def run(self, node: fx.Node) -> Run:
        """Return which dimensions of a value by window are images and windows. Raises NoRest."""
        kind, windows = self.typing.type(node), split_tokens(self.rows[0])
        for at in range(len(kind)):
            for end in range(at + 1, len(kind) + 1):
                # One image is a dimension of size one, or none; it is part of the run.
                factors = tuple(f for dim in kind[at:end] for f in split_tokens(dim) if f.whole_size != 1)
                if factors == windows:
                    return Run(at, end - at)
                heads = factors[len(windows) :]
                if end == at + 1 and factors[: len(windows)] == windows and is_plain(heads):
                    return Run(at, 1, whole_size(heads))
        raise NoRest(f"{operator_name(node)} inside it doesn't keep windows apart")

    def seen(self, operand: fx.Node, node: fx.Node) -> Run:
        """Return where the windows of an operand of `node` are.

        Raises NoRest for tokens that aren't [windows, tokens, features].
        """
        form = self.of[operand]
        if isinstance(form, Run):
            return form
        if form != self.of_rows or self.typing.type(operand)[:-1] != self.rows:
            raise NoRest(f"{operator_name(node)} inside it reads windows in another arrangement")
        return Run(0, 1)

    def in_rows(self, kind: TensorType) -> bool:
        """Return whether a value's tokens come in the order of the rows."""
        return _flat(kind[:-1]) == _flat(self.rows)


def _is_of_tokens(kind: TensorType) -> bool:
    """Return whether every dimension is images or tokens, but for features, the last one."""
    if len(kind) < 2 or not is_plain(kind[-1]):
        return False
    return not any(isinstance(f, Plain) and not f.images and f.size != 1 for dim in kind[:-1] for f in dim)


def _holds_padding(kind: TensorType) -> bool:
    """Return whether the one grid of a type is a padded one. Raises NoLayout."""
    grid = grid_of(kind)
    return any(made.inside is not None for made in made_from(base_of(grid) if grid.parts else grid))


def _flat(kind: TensorType) -> Dim:
    """Return the factors of all dimensions, tokens as their grid's."""
    factors: list[Factor] = [f for dim in kind for f in split_tokens(dim) if f.whole_size != 1]
    return tuple(factors)


def _nowhere(*_: object) -> None:
    """Insert nothing: conversions are tried without a graph."""
