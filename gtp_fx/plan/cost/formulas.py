"""FLOPs of one operator from the sizes of its operands: 2 per multiply-add, as torch.utils.flop_counter counts.

A formula only multiplies and adds. So its sizes may be integers (for `count`), or arrays with an entry for each
candidate token count (for `closed_form`). The operators that models are made of have one here. Any other is run on meta
tensors, once for each candidate, and counted by torch's own formulas (`gtp_fx.plan.cost.opened`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx
from torch.ops import aten, gtp_fx  # type: ignore[import-not-found]

import gtp_fx.ops as ops
from gtp_fx.graph.operators import CONVOLUTIONS, MATRIX_PRODUCTS, PRODUCTS_ADDED_TO, TRANSPOSED_CONVOLUTIONS
from gtp_fx.plan.cost.opened import opened

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


def formula_of(node: fx.Node) -> Formula | None:
    """Return the formula of a node's operator; None where it multiplies no matrices."""
    known = _formulas.get(node.target)
    if known is not None or node.op != "call_function":
        return known
    return by_running if opened(node).flops else None


def by_running(sizes: Sizes) -> Size:
    """Count by running the operator on meta tensors of each of the sizes."""
    operands = list(sizes.operands)
    ends = list(itertools.accumulate(len(sizes.operands[operand]) for operand in operands))

    def at(*flat: int) -> int:
        shapes = [flat[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        return opened(sizes.node, dict(zip(operands, shapes, strict=True))).flops

    flat = [size for operand in operands for size in sizes.operands[operand]]
    if any(isinstance(size, np.ndarray) for size in flat):
        return np.vectorize(at, otypes=[np.int64])(*flat)
    return at(*flat)


@formula(aten.linear.default)
def linear(sizes: Sizes) -> Size:
    return 2 * math.prod(sizes(0)) * sizes(1)[0]


@formula(*MATRIX_PRODUCTS)
def matmul(sizes: Sizes) -> Size:
    """Count a product of matrices; one with a vector behind is a sum, which torch counts as none."""
    if len(sizes(1)) == 1:
        return 0
    return 2 * math.prod(sizes.output) * sizes(0)[-1]


@formula(*PRODUCTS_ADDED_TO)
def addmm(sizes: Sizes) -> Size:
    return 2 * math.prod(sizes.output) * sizes(1)[-1]


@formula(*CONVOLUTIONS)
def convolution(sizes: Sizes) -> Size:
    """Count the weight [C', C/groups, *kernel] once for every output position."""
    return 2 * _parts(sizes) * math.prod(sizes.output) * math.prod(sizes(1)[1:])


@formula(*TRANSPOSED_CONVOLUTIONS)
def transposed_convolution(sizes: Sizes) -> Size:
    """Count the weight [C, C'/groups, *kernel] once for every input position."""
    return 2 * _parts(sizes) * math.prod(sizes(0)) * math.prod(sizes(1)[1:])


def _parts(sizes: Sizes) -> int:
    """Return the number of real convolutions that one is: three where it is complex."""
    return 3 if sizes.node.meta["val"].is_complex() else 1


@formula(aten.scaled_dot_product_attention.default)
def attention(sizes: Sizes) -> Size:
    """Count q·kᵀ and its product with v, for every head and image of the output: those of q or k may be broadcast."""
    queries, features = sizes(0)[-2:]
    keys, width = sizes(2)[-2:]
    return 2 * math.prod(sizes.output[:-2]) * queries * keys * (features + width)


@formula(gtp_fx.attention_with_scores.default)
def attention_with_scores(sizes: Sizes) -> Size:
    """Count attention, and the column sums of its map where the score needs them."""
    *batch, tokens, _ = sizes(0)
    column_sums = sizes.node.args[6].startswith(("mixed", "broadcast"))  # type: ignore[union-attr]
    return attention(sizes) + (2 * math.prod(batch) * tokens * tokens if column_sums else 0)


@formula(gtp_fx.scores_of_map.default)
def scores_of_map(sizes: Sizes) -> Size:
    """Count the column sums of an attention map where the score needs them."""
    return 2 * math.prod(sizes(0)) if sizes.node.args[1].startswith(("mixed", "broadcast")) else 0  # type: ignore[union-attr]


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
    _, grid, _, kind, _, *places = arguments
    batch, _, channels = sizes(0)
    patches = sizes(5)[1] if places else math.prod(grid)
    return 0 if kind == "spatial" else 2 * batch * patches**2 * channels


@formula(gtp_fx.attended_shares.default)
def attended_shares(sizes: Sizes) -> Size:
    """Count the product of every removed token's query with every key of the patches that are left, for every head."""
    arguments: tuple[Any, ...] = sizes.node.args
    batch, heads, keys, features = sizes(1)
    removed = sizes(2)[1]
    return 2 * batch * heads * removed * (keys - arguments[3] - arguments[4]) * features


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
