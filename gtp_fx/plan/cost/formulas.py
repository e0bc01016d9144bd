"""FLOPs of one operator from the sizes of its operands: 2 per multiply-add, as torch.utils.flop_counter counts.

A formula only multiplies and adds. So its sizes may be integers (for `count`), or arrays with an entry for each
candidate token count (for `closed_form`). Operators without a formula count as 0, as they do in torch: only products
and convolutions have one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.ops import aten, gtp_fx  # type: ignore[import-not-found]

from gtp_fx import ops
from gtp_fx.graph.operators import CONVOLUTIONS, MATRIX_PRODUCTS, PRODUCTS_ADDED_TO
from gtp_fx.types.rules.einsum import Equation

assert ops

Size = Any
"""An int, or an array with an entry for each candidate token count."""


@dataclass(frozen=True)
class Sizes:
    """The shapes that go into and come out of one node.

    node: the node itself, for arguments that are no tensors.
    operands: the shape of each operand, in the type that the node needs.
    output: the shape of the (first) result.
    """

    node: fx.Node
    operands: Mapping[fx.Node, Sequence[Size]]
    output: Sequence[Size]

    def __call__(self, position: int) -> Sequence[Size]:
        """Return the shape of the operand at an argument position."""
        return self.operands[self.node.args[position]]  # type: ignore[index]


Formula = Callable[[Sizes], Size]
_formulas: dict[Any, Formula] = {}


def formula(*operators: Any) -> Callable[[Formula], Formula]:
    """Register the decorated function as the formula of some operators."""

    def register(function: Formula) -> Formula:
        _formulas.update(dict.fromkeys(operators, function))
        return function

    return register


def find(operator: Any) -> Formula | None:
    """Return the formula of an operator, or None where it has none."""
    return _formulas.get(operator)


@formula(aten.linear.default)
def linear(sizes: Sizes) -> Size:
    return 2 * math.prod(sizes(0)) * sizes(1)[0]


@formula(*MATRIX_PRODUCTS, aten.mm.default)
def matmul(sizes: Sizes) -> Size:
    return 2 * math.prod(sizes.output) * sizes(0)[-1]


@formula(*PRODUCTS_ADDED_TO)
def addmm(sizes: Sizes) -> Size:
    return 2 * math.prod(sizes.output) * sizes(1)[-1]


@formula(*CONVOLUTIONS)
def convolution(sizes: Sizes) -> Size:
    """Count the weight [C', C/groups, *kernel] once for every output position."""
    return 2 * math.prod(sizes.output) * math.prod(sizes(1)[1:])


@formula(aten.einsum.default)
def einsum(sizes: Sizes) -> Size:
    """Count operands joined from left to right, each label summed over once nothing later has it."""
    arguments: tuple[Any, ...] = sizes.node.args
    equation = Equation.parse(arguments[0])
    if equation is None:
        return 0
    by_label: dict[str, Size] = {}
    for term, operand in zip(equation.terms, arguments[1], strict=True):
        for label, size in zip(term, sizes.operands[operand], strict=True):
            known = by_label.get(label, 1)
            by_label[label] = size if isinstance(known, int) and known == 1 else known
    total, joined = 0, set(equation.terms[0])
    for position, term in enumerate(equation.terms[1:], start=1):
        joined |= set(term)
        total += 2 * math.prod(by_label[label] for label in sorted(joined))
        joined &= set(equation.result).union(*equation.terms[position + 1 :])
    return total


@formula(aten.scaled_dot_product_attention.default)
def attention(sizes: Sizes) -> Size:
    """Count q·kᵀ and its product with v."""
    *batch, queries, features = sizes(0)
    keys, width = sizes(2)[-2:]
    return 2 * math.prod(batch) * queries * keys * (features + width)


@formula(gtp_fx.attention_with_scores.default)
def attention_with_scores(sizes: Sizes) -> Size:
    """Count attention, and the column sums of its map where the score needs them."""
    *batch, tokens, _ = sizes(0)
    column_sums = sizes.node.args[6].startswith(("mixed", "broadcast"))  # type: ignore[union-attr]
    return attention(sizes) + (2 * math.prod(batch) * tokens * tokens if column_sums else 0)


@formula(gtp_fx.attention_with_cell_scores.default)
def attention_with_cell_scores(sizes: Sizes) -> Size:
    """Count attention, and what each cell receives where the score needs it."""
    column_sums = sizes.node.args[5].startswith(("mixed", "broadcast"))  # type: ignore[union-attr]
    *batch, queries, _ = sizes(0)
    return attention(sizes) + (2 * math.prod(batch) * queries * sizes(1)[-2] if column_sums else 0)


@formula(gtp_fx.token_graph.default)
def token_graph(sizes: Sizes) -> Size:
    """Count the cosine similarity of every pair of patches; a spatial graph reads coordinates only."""
    arguments: tuple[Any, ...] = sizes.node.args
    _, grid, _, kind, _ = arguments
    batch, _, channels = sizes(0)
    return 0 if kind == "spatial" else 2 * batch * math.prod(grid) ** 2 * channels


@formula(gtp_fx.recover.default)
def recover(sizes: Sizes) -> Size:
    """Count the product of every recovered token with every patch that was kept."""
    arguments: tuple[Any, ...] = sizes.node.args
    batch, back, kept = sizes(1)
    images, tokens = arguments[4], arguments[5]
    rest = math.prod(size for dim, size in enumerate(sizes.output) if dim not in (images, tokens))
    return 2 * batch * back * kept * rest


@formula(gtp_fx.propagate.default)
def propagate(sizes: Sizes) -> Size:
    """Count the product of every token that is kept, prefix tokens included, with every one that is removed."""
    batch, _, removed = sizes(1)
    return 2 * batch * sizes.output[1] * removed * sizes.output[2]
