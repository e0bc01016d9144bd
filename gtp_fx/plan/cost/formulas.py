"""FLOPs of one operator from the sizes of its operands: 2 per multiply-add, as torch.utils.flop_counter counts.

A formula only multiplies and adds, so sizes may be integers (`count`) or arrays of them, an entry a candidate count of tokens (`closed_form`).
Operators without a formula count nothing, as there: only products and convolutions do.
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
"""An int, or an array of candidates."""


@dataclass(frozen=True)
class Sizes:
    """The shapes around one node. operands: by node, in the type that the node needs; output: of its (first) result."""

    node: fx.Node
    operands: Mapping[fx.Node, Sequence[Size]]
    output: Sequence[Size]

    def __call__(self, position: int) -> Sequence[Size]:
        return self.operands[self.node.args[position]]  # type: ignore[index]


Formula = Callable[[Sizes], Size]
_formulas: dict[Any, Formula] = {}


def formula(*operators: Any) -> Callable[[Formula], Formula]:
    def register(function: Formula) -> Formula:
        _formulas.update(dict.fromkeys(operators, function))
        return function

    return register


def find(operator: Any) -> Formula | None:
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
    """The weight [C', C/groups, *kernel] is applied once at every output position."""
    return 2 * math.prod(sizes.output) * math.prod(sizes(1)[1:])


@formula(aten.einsum.default)
def einsum(sizes: Sizes) -> Size:
    """Operands are joined from left to right; what no later one asks for is summed over on the way."""
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
    """q·kᵀ and its product with v."""
    *batch, queries, features = sizes(0)
    keys, width = sizes(2)[-2:]
    return 2 * math.prod(batch) * queries * keys * (features + width)


@formula(gtp_fx.attention_with_scores.default)
def attention_with_scores(sizes: Sizes) -> Size:
    """Attention, and the column sums of its map where the score asks for them."""
    *batch, tokens, _ = sizes(0)
    column_sums = sizes.node.args[6].startswith(("mixed", "broadcast"))  # type: ignore[union-attr]
    return attention(sizes) + (2 * math.prod(batch) * tokens * tokens if column_sums else 0)


@formula(gtp_fx.attention_with_cell_scores.default)
def attention_with_cell_scores(sizes: Sizes) -> Size:
    """Attention, and what each cell receives where the score asks for it."""
    column_sums = sizes.node.args[5].startswith(("mixed", "broadcast"))  # type: ignore[union-attr]
    *batch, queries, _ = sizes(0)
    return attention(sizes) + (2 * math.prod(batch) * queries * sizes(1)[-2] if column_sums else 0)


@formula(gtp_fx.token_graph.default)
def token_graph(sizes: Sizes) -> Size:
    """Cosine similarity of every pair of patches; a spatial graph asks coordinates only."""
    arguments: tuple[Any, ...] = sizes.node.args
    _, grid, _, kind, _ = arguments
    batch, _, channels = sizes(0)
    return 0 if kind == "spatial" else 2 * batch * math.prod(grid) ** 2 * channels


@formula(gtp_fx.recover.default)
def recover(sizes: Sizes) -> Size:
    """Every token that comes back, times every patch that had stayed."""
    arguments: tuple[Any, ...] = sizes.node.args
    batch, back, kept = sizes(1)
    images, tokens = arguments[4], arguments[5]
    rest = math.prod(size for dim, size in enumerate(sizes.output) if dim not in (images, tokens))
    return 2 * batch * back * kept * rest


@formula(gtp_fx.propagate.default)
def propagate(sizes: Sizes) -> Size:
    """Every token that stays, prefix tokens too, times every one that leaves."""
    batch, _, leaving = sizes(1)
    return 2 * batch * sizes.output[1] * leaving * sizes.output[2]
