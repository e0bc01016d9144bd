"""Read the logits of an attention algebraically, from the softmax back to q·kᵀ.

Whatever is done to q·kᵀ on the way is affine: logits = scale · q·kᵀ + bias, where entries may be hidden. Sums, scales,
masks and views are undone one by one, and what they contributed is kept as a list of addends, each in the shape in
which the logits were seen there: [images * heads, rows, columns, rows, columns], say, for positions by row and by
column. A view keeps the order of the entries, so an addend of any such shape has one of q·kᵀ's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph.operators import (
    CHOICES,
    DIVISIONS,
    LIKE_ANOTHER,
    MASKED_FILLS,
    MATRIX_PRODUCTS,
    RESIDUAL_SUMS,
    SCALINGS,
)
from gtp_fx.graph.symbols import shape_of
from gtp_fx.passes.exact.read_softmax import NUMBER_PRESERVING, VIEWED

_NUMBERS_ADDED = (aten.add.Scalar, aten.sub.Scalar)
_NEGATIONS = (aten.neg.default, aten.rsub.Scalar)
HIDES = -1e4
"""A logit from here down is hidden: its weight is 0 in every floating-point format, beside any that isn't."""


@dataclass(frozen=True)
class Factor:
    """A tensor that multiplies or divides the logits, constant along both token axes."""

    value: fx.Node
    divides: bool = False


@dataclass(frozen=True)
class Addend:
    """A tensor that is added to the logits.

    value: broadcasts to `shape`.
    shape: the logits' shape where it is added.
    times, factors: what it is multiplied by afterwards.
    """

    value: fx.Node
    shape: tuple[int, ...]
    times: float = 1.0
    factors: tuple[Factor, ...] = ()


@dataclass(frozen=True)
class Mask:
    """A mask that hides entries of the logits.

    value: boolean, broadcasts to `shape`.
    shape: the logits' shape where it is applied.
    fill: the number that is written over hidden entries, at most `HIDES`.
    shows: it is True where entries are visible, and not where they are hidden.
    """

    value: fx.Node
    shape: tuple[int, ...]
    fill: float
    shows: bool = False


@dataclass(frozen=True)
class Logits:
    """Logits of an attention: scale · factors · q·kᵀ + addends, with entries hidden by masks.

    product: the node q·kᵀ.
    shape: the shape in which the logits are seen at the end.
    scale, factors: what multiplies q·kᵀ.
    addends, masks: in the order of the graph.
    masked_last: nothing is added to the logits after a mask.
    """

    product: fx.Node
    shape: tuple[int, ...]
    scale: float = 1.0
    factors: tuple[Factor, ...] = ()
    addends: tuple[Addend, ...] = ()
    masks: tuple[Mask, ...] = ()
    masked_last: bool = True

    @property
    def q(self) -> fx.Node:
        """Return the queries, [..., tokens, features]."""
        return self.product.args[0]  # type: ignore[return-value]

    @property
    def k_transposed(self) -> fx.Node:
        """Return the transposed keys, [..., features, tokens]."""
        return self.product.args[1]  # type: ignore[return-value]

    def times(self, number: float) -> Logits | None:
        """Multiply by a number; None where that would show what was hidden."""
        masks = tuple(replace(mask, fill=mask.fill * number) for mask in self.masks)
        if not math.isfinite(number) or any(not mask.fill <= HIDES for mask in masks):
            return None
        addends = tuple(replace(addend, times=addend.times * number) for addend in self.addends)
        return replace(self, scale=self.scale * number, addends=addends, masks=masks)

    def times_tensor(self, factor: Factor) -> Logits | None:
        """Multiply by a tensor; None where its sign decides what is hidden, or where it isn't one number a head."""
        seen = self.shape == shape_of(self.product)
        if self.masks or not seen or not set(shape_of(factor.value)[-2:]) <= {1}:
            return None
        addends = tuple(replace(addend, factors=(*addend.factors, factor)) for addend in self.addends)
        return replace(self, factors=(*self.factors, factor), addends=addends)

    def plus(self, value: Any, times: float) -> Logits | None:
        """Add a tensor. A number is added to every entry alike, so it falls out of the softmax."""
        if not isinstance(value, fx.Node):
            return self
        addend = Addend(value, self.shape, times)
        return replace(self, addends=(*self.addends, addend), masked_last=not self.masks)

    def hidden_by(self, mask: Any, fill: Any, shows: bool = False) -> Logits | None:
        """Write a number over some entries; None where it doesn't hide them."""
        number = _number(fill)
        if not isinstance(mask, fx.Node) or number is None or not number <= HIDES:
            return None
        return replace(self, masks=(*self.masks, Mask(mask, self.shape, number, shows)))


IsKeys = Callable[[fx.Node], bool]
"""Tells whether a matrix [..., features, keys] holds something for each key that is a token of the image."""


def read_logits(node: Any, is_keys: IsKeys) -> Logits | None:
    """Parse `node` as logits of an attention; None where they are something else.

    is_keys: chooses between several products that are added up.
    """
    return None if not isinstance(node, fx.Node) else _parsed(node, is_keys)


def _inner(node: Any, is_keys: IsKeys) -> Logits | None:
    """Parse logits of which nothing else reads an entry: another tensor may be made in their shape."""
    if not isinstance(node, fx.Node) or len([user for user in node.users if user.target not in LIKE_ANOTHER]) != 1:
        return None
    return _parsed(node, is_keys)


def _parsed(node: fx.Node, is_keys: IsKeys) -> Logits | None:
    if node.target in MATRIX_PRODUCTS:
        return Logits(node, shape_of(node))
    if node.target in RESIDUAL_SUMS:
        return _sum(node, is_keys)
    if node.target in SCALINGS:
        return _scaled(node, is_keys)
    if node.target in CHOICES:
        return _chosen(node, is_keys)
    if node.target not in (*NUMBER_PRESERVING, *VIEWED, *MASKED_FILLS, *_NUMBERS_ADDED, *_NEGATIONS):
        return None
    found = _inner(node.args[0], is_keys)
    if found is None or node.target in (*NUMBER_PRESERVING, *_NUMBERS_ADDED):
        return found
    if node.target in _NEGATIONS:
        return found.times(-1.0) if len(node.args) < 3 and not node.kwargs else None
    if node.target in VIEWED:
        return replace(found, shape=shape_of(node))
    # A mask that is larger than the logits would spread them over more entries.
    return found.hidden_by(node.args[1], node.args[2]) if shape_of(node) == found.shape else None


def _sum(node: fx.Node, is_keys: IsKeys) -> Logits | None:
    """Parse a sum or difference of logits and something else."""
    alpha: Any = node.kwargs.get("alpha", 1)
    times = (1.0, float(-alpha if node.target is aten.sub.Tensor else alpha))
    read = [_inner(side, is_keys) for side in node.args[:2]]
    sides = [side for side in (0, 1) if read[side] is not None and read[side].shape == shape_of(node)]  # type: ignore[union-attr]
    if not sides:
        return None
    # Of two products, the one with a row for each key of the image: the other one is a bias.
    side = next((side for side in sides if is_keys(read[side].k_transposed)), sides[0])  # type: ignore[union-attr]
    found = read[side].times(times[side])  # type: ignore[union-attr]
    return None if found is None else found.plus(node.args[1 - side], times[1 - side])


def _scaled(node: fx.Node, is_keys: IsKeys) -> Logits | None:
    """Parse logits that are multiplied or divided by a number or a tensor."""
    inner, factor = node.args[:2]
    divides = node.target in DIVISIONS
    found = _inner(inner, is_keys)
    if found is None and not divides:  # a product's operands may be in either order
        inner, factor = factor, inner
        found = _inner(inner, is_keys)
    if found is None:
        return None
    if isinstance(factor, int | float):
        return found.times(1 / factor if divides else factor) if factor else None
    return found.times_tensor(Factor(factor, divides)) if isinstance(factor, fx.Node) else None


def _chosen(node: fx.Node, is_keys: IsKeys) -> Logits | None:
    """Parse where(mask, logits, number) and where(mask, number, logits)."""
    mask, *sides = node.args
    for shows in (True, False):
        inner, fill = sides if shows else sides[::-1]
        found = _inner(inner, is_keys)
        if found is not None and found.shape == shape_of(node):
            return found.hidden_by(mask, fill, shows)
    return None


def _number(value: Any) -> float | None:
    """Return a number, or that of which a constant tensor is full; None for any other value."""
    if isinstance(value, int | float):
        return float(value)
    if not isinstance(value, fx.Node):
        return None
    if value.target in NUMBER_PRESERVING or value.target is aten.expand.default or value.target in VIEWED:
        return _number(value.args[0])
    if value.target in (aten.full.default, aten.full_like.default):
        return _number(value.args[1])
    return _number(value.args[0]) if value.target is aten.scalar_tensor.default else None
