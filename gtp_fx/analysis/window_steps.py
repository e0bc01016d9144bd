"""What each node of a block does for some of its windows alone.

A value is *tokens* where all its dimensions but features are images and patches, in whatever arrangement, and *by
window* where images and windows are dimensions next to each other. Tokens become [windows, patches, features], so that
what only rearranges them is gone. What is by window keeps its form, with fewer windows, and a table that has an entry
for each of them is taken for those.

Where windows are padded, tokens become [images, tokens of the windows that are awake, features] instead. Between the
operator that pads them and the one that crops them they are *padded*, [windows, patches and padding, features].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.analysis.branch_parts import is_token_wise, with_fewer_dimensions
from gtp_fx.errors import NotApplicable
from gtp_fx.graph.nodes import operator_name
from gtp_fx.graph.operators import ATTENTION, FEATURE_NORMS, NAMED_DIMENSIONS, PADDINGS, PERMUTATIONS, REARRANGED, VIEWS
from gtp_fx.graph.symbols import is_symbolic, shape_of
from gtp_fx.types.axes import Dim, Factor, Plain, TensorType, is_plain, whole_size
from gtp_fx.types.grids import GridAxis
from gtp_fx.types.infer import WholeTyping
from gtp_fx.types.layouts import NoLayout, base_of, convert, grid_of, made_from
from gtp_fx.types.merging import split_tokens

MOVES = (*VIEWS, *PERMUTATIONS, *REARRANGED, *PADDINGS, aten.roll.default, aten.slice.Tensor, aten.flatten.using_ints)
"""What does nothing but rearrange tokens, where both its operand and its result are all of them."""


PAD, CROP = "pad", "crop"
"""Targets of steps: tokens of the windows that are awake, to these windows with their padding, and back."""
PADDED = "padded"
"""Form of a value whose dimensions but features are all places of the windows, padding among them, in any order."""


class NoRest(NotApplicable):
    """Raised where the windows of a block can't rest; the message is the reason that a user reads."""


@dataclass(frozen=True)
class Step:
    """What one node of the block does for fewer windows.

    node: the node.
    target: the operator; None where the value is that of its operand, in another arrangement.
    args, kwargs: its arguments, in which nodes of the block stand for what their steps return.
    taken: of the operands from outside, those with an entry for each window, and in which dimension.
    reshaped: operands that come in another shape first, with that shape.
    """

    node: fx.Node
    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    taken: tuple[tuple[fx.Node, int], ...] = ()
    reshaped: tuple[tuple[fx.Node, tuple[int, ...]], ...] = ()

    def copied(self, at: Mapping[fx.Node, fx.Node]) -> Step:
        """Return this step in a copy of the graph. at: each node's copy."""
        return replace(
            self,
            node=at[self.node],
            args=fx.map_arg(self.args, at.__getitem__),
            kwargs=fx.map_arg(dict(self.kwargs), at.__getitem__),
            taken=tuple((at[node], dim) for node, dim in self.taken),
            reshaped=tuple((at[node], shape) for node, shape in self.reshaped),
        )


@dataclass(frozen=True)
class _Run:
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


@dataclass
class Walk:
    """State of the walk through a block.

    typing: types with every token in place.
    rows: the layout by window.
    forms: of every value of the block, where its windows are; None for tokens, PADDED for padded ones.
    """

    typing: WholeTyping
    rows: TensorType
    forms: dict[fx.Node, _Run | str | None] = field(default_factory=dict)

    @property
    def padded(self) -> bool:
        """Whether windows hold padding."""
        return _holds_padding(self.rows)

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

    def step(self, node: fx.Node) -> Step:
        """Return what a node does for fewer windows, and note its form. Raises NoRest."""
        answer = self.typing.results.get(node)
        if answer is None or answer.barrier:
            raise NoRest(f"{operator_name(node)} inside it isn't understood")
        if self.is_tokens(node):
            step = self._of_tokens(node)
        else:
            step = self._of_padded(node) if self.is_padded(node) else self._by_window(node)
        inner = [n for n in step.node.all_input_nodes if not self.typing.is_tensor(n)]
        if step.target is not None and any(n in inner for n in _nodes_in(step.args)):
            raise NoRest(f"{operator_name(node)} inside it has a size that follows the batch")
        return step

    # ---- tokens

    def _of_tokens(self, node: fx.Node) -> Step:
        kind, own = self.typing.type(node), self._own(node)
        self.forms[node] = None
        if node.target in MOVES and len(own) == 1 and node.args[0] is own[0]:
            form = self.forms[own[0]]
            if form is None:
                return self._moved(node, own[0])
            if form == PADDED and self.typing.type(own[0])[-1] == kind[-1]:
                return Step(node, CROP, (own[0],))
            return self._out_of_windows(node, own[0])
        return self._token_wise(node, own)

    def _moved(self, node: fx.Node, operand: fx.Node) -> Step:
        """Return the step of what only rearranges tokens, or takes some of their features."""
        kind, before = self.typing.type(node), self.typing.type(operand)
        if before[-1] == kind[-1]:
            return Step(node, None, (operand,))
        if node.target is not aten.slice.Tensor or before[:-1] != kind[:-1]:
            raise NoRest("features are taken apart between tokens")
        return Step(node, node.target, with_fewer_dimensions(node), node.kwargs)  # some of the features

    def _out_of_windows(self, node: fx.Node, operand: fx.Node) -> Step:
        kind, form = self.typing.type(node), self.forms[operand]
        if node.target not in VIEWS or not isinstance(form, _Run) or form.at or not self._in_rows(kind):
            raise NoRest("what leads out of its windows isn't a view")
        shape = (-1, whole_size(self.rows[1]), whole_size(kind[-1]))
        return Step(node, aten.reshape.default, (operand, list(shape)))

    def _token_wise(self, node: fx.Node, own: list[fx.Node]) -> Step:
        kind = self.typing.type(node)
        alike = all(self.forms[n] == self.forms[node] and self.typing.type(n)[:-1] == kind[:-1] for n in own)
        if not alike or not is_token_wise(node, kind[:-1], self.typing):
            raise NoRest(f"{operator_name(node)} inside it isn't token-wise")
        # A parameter of more dimensions, [1, 1, 1, C], would give them to the tokens.
        flat = tuple(
            (n, (shape_of(n)[-1],))
            for n in node.all_input_nodes
            if n not in own and self.typing.is_tensor(n) and len(shape_of(n)) > len(self.rows) + 1
        )
        return Step(node, node.target, with_fewer_dimensions(node), node.kwargs, (), flat)

    def _of_padded(self, node: fx.Node) -> Step:
        own = self._own(node)
        self.forms[node] = PADDED
        if node.target in PADDINGS:
            if self.forms[own[0]] is not None or not _pads_with_zeros(node):
                raise NoRest("its windows are padded with something else than zeros, or more than once")
            return Step(node, PAD, (own[0],))
        if node.target in MOVES and len(own) == 1 and node.args[0] is own[0]:
            if self.forms[own[0]] == PADDED:
                return self._moved(node, own[0])
            return self._out_of_windows(node, own[0])
        return self._token_wise(node, own)

    def _in_rows(self, kind: TensorType) -> bool:
        """Return whether a value's tokens come in the order of the rows."""
        return _flat(kind[:-1]) == _flat(self.rows)

    # ---- by window

    def _by_window(self, node: fx.Node) -> Step:
        kind, own = self.typing.type(node), self._own(node)
        run = self._run(kind, node)
        self.forms[node] = run
        shape = shape_of(node)
        if node.target in VIEWS:
            return self._view(node, own[0], run, shape)
        forms = [self._seen(n, node) for n in own]
        name = operator_name(node)
        if node.target in PERMUTATIONS:
            return Step(node, aten.permute.default, (own[0], _permuted(node, forms[0], len(shape))))
        if node.target in REARRANGED:
            return Step(node, node.target, node.args, node.kwargs)
        if node.target is aten.unsqueeze.default:
            new: Any = node.args[1]
            return Step(node, node.target, (own[0], run.dim(new % len(shape))))
        if node.target in NAMED_DIMENSIONS and len(own) == 1 and node.args[0] is own[0]:
            return Step(node, node.target, _renamed(node, forms[0], len(shape_of(own[0]))), node.kwargs)
        if any(form != run or len(shape_of(n)) != len(shape) for form, n in zip(forms, own, strict=True)):
            raise NoRest(f"{name} inside it meets windows in two arrangements")
        if node.target is aten.expand.default:
            sizes = [-1 if a == b else b for a, b in zip(shape_of(own[0]), shape, strict=True)]
            sizes[run.at : run.at + run.length] = [-1]
            return Step(node, node.target, (own[0], sizes))
        behind = len(shape) - run.at - run.length  # dimensions after the windows
        if node.target is aten.einsum.default:
            return _einsum(node, own, run)
        of_features = own == [node.args[0]] and (
            (node.target is aten.linear.default and behind > 0)
            or (node.target in FEATURE_NORMS and len(node.args[1]) <= behind)  # type: ignore[arg-type]
        )
        if of_features:  # its parameters are of features alone
            return Step(node, node.target, node.args, node.kwargs)
        attends = node.target in ATTENTION and behind >= 2 and set(own) >= set(node.args[:3])
        if not attends and torch.Tag.pointwise not in getattr(node.target, "tags", ()):
            raise NoRest(f"{name} inside it isn't known to work within each window")
        taken, reshaped = [], []
        for operand in (n for n in node.all_input_nodes if n not in own and self.typing.is_tensor(n)):
            sizes = list(shape_of(operand))
            first = len(shape) - len(sizes)  # operands are aligned at the end
            there = [d - first for d in range(run.at, run.at + run.length) if d >= first]
            if all(sizes[d] == 1 for d in there):
                if run.length > 1 and len(there) > 1:
                    reshaped.append((operand, (*sizes[: there[0]], 1, *sizes[there[-1] + 1 :])))
                continue
            if run.length > 1 or run.shared > 1 or sizes[there[0]] != shape[run.at]:
                raise NoRest(f"{name} inside it reads a table by window that fewer windows can't be taken from")
            taken.append((operand, there[0]))
        return Step(node, node.target, node.args, node.kwargs, tuple(taken), tuple(reshaped))

    def _view(self, node: fx.Node, operand: fx.Node, run: _Run, shape: tuple[int, ...]) -> Step:
        form, kind = self.forms[operand], self.typing.type(operand)
        out_of = isinstance(form, _Run)
        in_order = out_of or (form == (PADDED if self.padded else None) and run.at == 0 and self._in_rows(kind))
        if not in_order or (isinstance(form, _Run) and shape_of(operand)[: form.at] != shape[: run.at]):
            raise NoRest("what leads into its windows isn't a view")
        sizes = [*shape[: run.at], -1, *shape[run.at + run.length :]]
        if any(is_symbolic(size) for size in sizes if size > 0):
            raise NoRest("images stand beside windows, apart from them")
        return Step(node, aten.reshape.default, (operand, sizes))

    def _seen(self, operand: fx.Node, node: fx.Node) -> _Run:
        """Return where the windows of an operand are.

        Raises NoRest for tokens that aren't [windows, tokens, features].
        """
        form = self.forms[operand]
        if isinstance(form, _Run):
            return form
        if form != (PADDED if self.padded else None) or self.typing.type(operand)[:-1] != self.rows:
            raise NoRest(f"{operator_name(node)} inside it reads windows in another arrangement")
        return _Run(0, 1)

    def _run(self, kind: TensorType, node: fx.Node) -> _Run:
        for at in range(len(kind)):
            for end in range(at + 1, len(kind) + 1):
                factors = tuple(f for dim in kind[at:end] for f in dim)
                if factors == self.rows[0]:
                    return _Run(at, end - at)
                heads = factors[len(self.rows[0]) :]
                if end == at + 1 and factors[: len(self.rows[0])] == self.rows[0] and is_plain(heads):
                    return _Run(at, 1, whole_size(heads))
        raise NoRest(f"{operator_name(node)} inside it doesn't keep windows apart")

    def _own(self, node: fx.Node) -> list[fx.Node]:
        """Return the operands that are values of the block."""
        return [operand for operand in node.all_input_nodes if operand in self.forms]


def _is_of_tokens(kind: TensorType) -> bool:
    """Return whether every dimension is images or tokens, but for features, the last one."""
    if len(kind) < 2 or not is_plain(kind[-1]):
        return False
    return not any(isinstance(f, Plain) and not f.images for dim in kind[:-1] for f in dim)


def _holds_padding(kind: TensorType) -> bool:
    """Return whether the one grid of a type is a padded one. Raises NoLayout."""
    grid = grid_of(kind)
    return any(made.inside is not None for made in made_from(base_of(grid) if grid.parts else grid))


def _pads_with_zeros(node: fx.Node) -> bool:
    """Return whether a padding adds zeros; aten.pad has a mode before the value."""
    mode_and_value = (*node.args[2:], *node.kwargs.values())
    return all(given in ("constant", None, 0) for given in mode_and_value)


def _einsum(node: fx.Node, own: list[fx.Node], run: _Run) -> Step:
    """Return the step of an einsum in which one letter is the windows of the result and of every operand by window."""
    equation, operands = node.args
    reads, _, result = str(equation).replace(" ", "").partition("->")
    letters = dict(zip(operands, reads.split(","), strict=True))  # type: ignore[arg-type]
    if "." in reads or run.length > 1 or not result:
        raise NoRest("aten.einsum.default inside it isn't known to work within each window")
    windows = result[run.at]
    if any(letters[n].find(windows) != run.at if n in own else windows in letters[n] for n in letters):
        raise NoRest("aten.einsum.default inside it works across windows")
    return Step(node, node.target, node.args, node.kwargs)


def _permuted(node: fx.Node, form: _Run, rank: int) -> list[int]:
    """Return the order of dimensions of a permutation where the windows are one of them."""
    order, named = list(range(rank)), node.args[1:3]
    if node.target is aten.transpose.int:
        a, b = (int(dim) % rank for dim in named)  # type: ignore[arg-type]
        order[a], order[b] = order[b], order[a]
    else:
        order = [int(dim) % rank for dim in named[0]]  # type: ignore[union-attr, arg-type]
    inside = range(form.at, form.at + form.length)
    places = [order.index(dim) for dim in inside]
    if places != list(range(places[0], places[0] + form.length)):
        raise NoRest("windows are permuted among each other")
    return [form.at if dim == form.at else form.dim(dim) for dim in order if dim == form.at or dim not in inside]


def _renamed(node: fx.Node, form: _Run, rank: int) -> tuple[Any, ...]:
    """Return the arguments of an operator that names dimensions, where the windows are one of them."""
    at = NAMED_DIMENSIONS[node.target]
    if at >= len(node.args) or node.args[at] is None:
        raise NoRest(f"{operator_name(node)} inside it works across windows")
    named: Any = node.args[at]
    dims = form.dim(named % rank) if isinstance(named, int) else [form.dim(dim % rank) for dim in named]
    return (*node.args[:at], dims, *node.args[at + 1 :])


def _flat(kind: TensorType) -> Dim:
    """Return the factors of all dimensions, tokens as their grid's."""
    factors: list[Factor] = [f for dim in kind for f in split_tokens(dim) if f.whole_size != 1]
    return tuple(factors)


def _nodes_in(arguments: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(arguments, found.append)
    return found


def _nowhere(*_: object) -> None:
    """Insert nothing: conversions are tried without a graph."""
