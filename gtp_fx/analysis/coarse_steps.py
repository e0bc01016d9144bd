"""What the nodes of a block do for a window that rests, of which one token stands for each cell (`Cells`).

They are the steps of a window that is awake, with G cells in place of its n places. A table with an entry for each
place is read at the middle of each cell; every other operator works on features or attends. A window's cells hold no
padding, so what pads windows or crops them has nothing to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.analysis.window_cells import Cells
from gtp_fx.analysis.window_forms import Forms, NoRest, Run
from gtp_fx.analysis.window_steps import CROP, PAD, Sampled, Step
from gtp_fx.graph.nodes import operator_name
from gtp_fx.graph.operators import ATTENTION, FEATURE_NORMS, NAMED_DIMENSIONS, PERMUTATIONS, REARRANGED, VIEWS
from gtp_fx.graph.symbols import shape_of
from gtp_fx.strategies.sites import Attention
from gtp_fx.types.axes import Dim
from gtp_fx.types.merging import split_tokens


def cells_of(forms: Forms) -> Cells:
    """Return the cells of a block's windows."""
    return Cells.of(tuple(factor.whole_size for factor in split_tokens(forms.rows[1])))


def coarse_steps(steps: Sequence[Step], forms: Forms, cells: Cells) -> tuple[Step, ...]:
    """Return what a block's nodes do for the cells of windows that rest, [windows, G, features].

    steps: what they do for windows that are awake. forms: of all of the block's values.

    Raises NoRest where one can't do without a value for every place.
    """
    walk = _Walk(forms, cells, tuple(split_tokens(forms.rows[1])))
    return tuple(walk.step(step) for step in steps)


@dataclass(frozen=True)
class _Walk:
    """The walk through a block's steps. inner: the factors that are a window's sides."""

    forms: Forms
    cells: Cells
    inner: tuple[Any, ...]

    def step(self, step: Step) -> Step:
        """Return one node's step."""
        node = step.node
        if step.target in (None, PAD, CROP):
            return replace(step, target=None)
        run = self.forms.of[node]
        if not isinstance(run, Run):
            if step.target is aten.reshape.default:  # out of windows, to [windows, places, features]
                operand, (first, _, features) = step.args
                return replace(step, args=(operand, [first, self.cells.count, features]))
            return step
        if node.target in VIEWS or node.target is aten.expand.default:
            return replace(step, args=(step.args[0], self._sizes(step, run)))
        if node.target in (*PERMUTATIONS, *REARRANGED, aten.unsqueeze.default, aten.linear.default):
            return step
        if node.target in NAMED_DIMENSIONS or node.target in FEATURE_NORMS:
            return self._of_features(step)
        if node.target in ATTENTION:
            return self._attention(step)
        if node.target is aten.einsum.default:
            return self._einsum(step)
        return self._pointwise(step, run)

    def _sizes(self, step: Step, run: Run) -> list[int]:
        """Return the sizes that a view or an expansion gives, where places become cells."""
        kind, sizes = self.forms.typing.type(step.node), list(step.args[1])
        for dim in range(len(kind)):
            at = dim if dim < run.at else dim - run.length + 1
            if not run.at <= dim < run.at + run.length and sizes[at] > 0 and self._sides(kind[dim]):
                sizes[at] = self._coarse_size(kind[dim])
        return sizes

    def _of_features(self, step: Step) -> Step:
        """Return the step of what names dimensions of its operand, which have to be features."""
        node = step.node
        kind = self.forms.typing.type(self.forms.own(node)[0])
        named: Any = node.args[NAMED_DIMENSIONS[node.target]] if node.target in NAMED_DIMENSIONS else None
        if named is None:  # a norm, over the last dimensions
            named = list(range(-len(node.args[1]), 0))  # type: ignore[arg-type]
        if any(self._sides(kind[dim]) for dim in ([named] if isinstance(named, int) else named)):
            raise NoRest(f"{operator_name(node)} inside it works across the places of a window")
        return step

    def _attention(self, step: Step) -> Step:
        """Return the step of attention among cells: its bias is read at their middles, queries' and keys'."""
        node, typing = step.node, self.forms.typing
        operands = Attention.of(node)
        for name in ("q", "k", "v"):
            if self._sides(typing.type(getattr(operands, name))[-2]) != self._every:
                raise NoRest(f"{operator_name(node)} inside it doesn't attend among the places of a window")
        bias, sampled = operands.bias, []
        if bias is not None:
            own = bias in self.forms.of
            for dim in (-2, -1):
                size = shape_of(bias)[dim]
                if size == 1 or (own and self._sides(typing.type(bias)[dim]) == self._every):
                    continue
                if size != self.cells.places:
                    raise NoRest(f"{operator_name(node)} inside it has a bias for other keys than a window's places")
                sampled.append(Sampled(bias, dim))
        return replace(step, sampled=tuple(sampled))

    def _einsum(self, step: Step) -> Step:
        """Return the step of an einsum whose tables have letters for places."""
        node = step.node
        equation, operands = node.args
        reads, _, result = str(equation).replace(" ", "").partition("->")
        letters = dict(zip(operands, reads.split(","), strict=True))  # type: ignore[arg-type]
        kind = self.forms.typing.type(node)
        places = {letter: self._sides(dim) for letter, dim in zip(result, kind, strict=True) if self._sides(dim)}
        sampled = []
        for operand, named in letters.items():
            if operand in self.forms.of:
                dims = zip(named, self.forms.typing.type(operand), strict=True)
                if any(self._sides(dim) and letter not in places for letter, dim in dims):
                    raise NoRest(f"{operator_name(node)} inside it works across the places of a window")
                continue
            for dim, letter in enumerate(named):
                if letter in places:
                    sampled.append(self._sampled(operand, dim - len(named), places[letter], node))
        return replace(step, sampled=tuple(sampled))

    def _pointwise(self, step: Step, run: Run) -> Step:
        """Return the step of what is pointwise, and may read tables."""
        node = step.node
        kind, sampled = self.forms.typing.type(node), []
        for table in node.all_input_nodes:
            if table in self.forms.of or not self.forms.typing.is_tensor(table):
                continue
            shape = shape_of(table)
            for dim in range(-min(len(shape), len(kind)), 0):
                sides = self._sides(kind[dim])
                if not sides or shape[dim] == 1:
                    continue
                if len(kind) + dim < run.at:
                    raise NoRest(f"{operator_name(node)} inside it reads a table of places in another arrangement")
                sampled.append(self._sampled(table, dim, sides, node))
        return replace(step, sampled=tuple(sampled))

    def _sampled(self, table: fx.Node, dim: int, sides: tuple[int, ...], node: fx.Node) -> Sampled:
        """Return where a table is read along a dimension of places. sides: those that the dimension holds."""
        if sides == self._every:
            return Sampled(table, dim)
        if len(sides) > 1:
            raise NoRest(f"{operator_name(node)} inside it reads a table of some sides of a window")
        return Sampled(table, dim, sides[0])

    @property
    def _every(self) -> tuple[int, ...]:
        return tuple(range(len(self.cells.sides)))

    def _sides(self, dim: Dim) -> tuple[int, ...]:
        """Return which of a window's sides a dimension holds, in order; empty for features and other sizes."""
        return tuple(self.inner.index(factor) for factor in split_tokens(dim) if factor in self.inner)

    def _coarse_size(self, dim: Dim) -> int:
        """Return the size of a dimension where each side has its cells in place of its places."""
        size = 1
        for factor in split_tokens(dim):
            size *= len(self.cells.sides[self.inner.index(factor)]) if factor in self.inner else factor.whole_size
        return size
