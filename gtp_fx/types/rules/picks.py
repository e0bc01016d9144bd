"""Rules for operators that pick entries by numbers in a tensor: gather, index_select, x[:, ids].

Patches that are picked become a row of their own: the context of a masked autoencoder, what patch dropout leaves, the
same tokens in another order. Whatever the numbers say, the row's tokens are what the numbers pick, so nothing need be
known of them here; the row records which tensor holds them (`Picked`), and its patches have the places that they say.
Prefix tokens among what is picked from could land anywhere, so then nothing is claimed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph.operators import CASTS, REARRANGED, VIEWS
from gtp_fx.graph.rearrangements import REARRANGING, Parts, rearranged, whole_parts
from gtp_fx.graph.symbols import is_symbolic, shape_of
from gtp_fx.types.axes import (
    Dim,
    Plain,
    TensorType,
    TokenAxis,
    TokenDomain,
    holds_images,
    is_plain,
    token_axis,
    whole_size,
)
from gtp_fx.types.grids import Grid, Picked
from gtp_fx.types.rules.registry import NEEDS_ALL, Call, NoRule, RuleResult, rule

_MASKS = (torch.bool, torch.uint8)
_SHOWN = (*VIEWS, *REARRANGED, *CASTS, aten.unsqueeze.default, aten.expand.default)
"""Operators through which numbers stay the same in every row, if they were."""


@rule(aten.index_select.default)
def index_select(call: Call) -> RuleResult:
    """Pick along one dimension, of every image the same."""
    x, index = call.type(0), call.operand(2)
    _require_numbers(call, index)
    return _along(call, x, call.arg(1) % len(x), index)


@rule(aten.gather.default)
def gather(call: Call) -> RuleResult:
    """Pick along one dimension, of each entry of the others its own: of each image its own tokens."""
    x, index = call.type(0), call.operand(2)
    _require_numbers(call, index)
    dim, shape = call.arg(1) % len(x), call.output_shape()
    if all(map(is_plain, x)):
        return _plain(call)
    axis = token_axis(x[dim])
    if axis is None or dim != 1 or len(x) != 3 or not is_plain(x[0]) or not is_plain(x[2]):
        raise NoRule("it picks entries of a value whose tokens aren't laid out as [batch, tokens, features]")
    # How many images the numbers are of may have a symbol of its own.
    if not (is_symbolic(shape[0]) or shape[0] == whole_size(x[0])):
        raise NoRule("it picks tokens of some images alone")
    alike = _alike_over_features(index)
    row = _row(call, axis, shape[1], index if alike else None, own=True)
    return _picked(call, x, ((Plain(shape[0], images=True),), row, (Plain(shape[2]),)))


@rule(aten.index.Tensor)
def index(call: Call) -> RuleResult:
    """Pick by one tensor along one dimension, or by the rows of the batch and each image's tokens."""
    x, given = call.type(0), list(call.arg(1))
    places = [place for place, each in enumerate(given) if each is not None]
    for place in places:
        _require_numbers(call, given[place])
    if all(map(is_plain, x)):
        return _plain(call)
    if len(places) == 1 and len(shape_of(given[places[0]])) == 1:
        return _along(call, x, places[0], given[places[0]])
    axis = token_axis(x[1]) if places == [0, 1] else None
    if axis is None or not is_plain(x[0]) or not _counts_images(given[0], whole_size(x[0])):
        raise NoRule("it picks entries by several tensors of numbers, or along several dimensions")
    tokens = given[1]
    shape = shape_of(tokens)
    if len(shape) != 2 or shape[0] != whole_size(x[0]):
        raise NoRule("it picks other numbers of tokens than one row an image")
    return _picked(call, x, (x[0], _row(call, axis, shape[1], tokens, own=True), *x[2:]))


def _along(call: Call, x: TensorType, dim: int, index: fx.Node) -> RuleResult:
    """Pick along one dimension by the same numbers everywhere."""
    size = call.output_shape()[dim]
    if is_plain(x[dim]):
        images = holds_images(x[dim])
        output = (*x[:dim], (Plain(size, images),), *x[dim + 1 :])
        operands = {call.operand(0): x}
        return RuleResult(output, operands=operands, prefix_operands=None, other_images=images)
    axis = token_axis(x[dim])
    if axis is None:
        raise NoRule("it picks places along one side of a grid, or tokens that are merged with another dimension")
    return _picked(call, x, (*x[:dim], _row(call, axis, size, index, own=False), *x[dim + 1 :]))


def _row(call: Call, axis: TokenAxis, count: int, index: fx.Node | None, own: bool) -> Dim:
    """Return the row of picked tokens. index: what picks them; None where it may pick other ones for each feature."""
    if is_symbolic(count):
        raise NoRule("how many tokens it picks varies")
    if axis.domain.level:
        raise NoRule("it picks tokens by their numbers among all of them")
    if axis.prefix or axis.suffix:
        raise NoRule("numbers in a tensor pick among patches and tokens that are no patches, and may mix them")
    picked = Picked(axis.domain.grid, "" if index is None else index.name, own)
    return (TokenAxis(TokenDomain(Grid(call.node.name, (count,), placed=False, picked=picked))),)


def _picked(call: Call, x: TensorType, output: TensorType) -> RuleResult:
    return RuleResult(output, operands={call.operand(0): x}, prefix_operands=NEEDS_ALL)


def _plain(call: Call) -> RuleResult:
    """Answer for numbers that pick from a table: what is picked is plain as well."""
    operands = {node: call.type_of(node) for node in call.tensors()}
    if not all(is_plain(dim) for kind in operands.values() for dim in kind):
        raise NoRule("tokens hold numbers that pick from a table")
    return RuleResult(call.plain_output(), operands=operands, prefix_operands=NEEDS_ALL)


def _require_numbers(call: Call, index: fx.Node) -> None:
    """Refuse masks, and numbers that tokens hold."""
    if index.meta["val"].dtype in _MASKS:
        raise NoRule("a mask picks tokens, so how many they are depends on what it holds: pick by their numbers")
    if not all(map(is_plain, call.type_of(index))):
        raise NoRule("the numbers that it picks by run over tokens themselves")


def _alike_over_features(index: fx.Node) -> bool:
    """Return whether the numbers [B, K, C] that gather reads are the same for all features: made by an expansion."""
    if shape_of(index)[-1] == 1:
        return True
    # Follow views and permutations back to the expansion; `repeat` is made of these as well.
    chain: list[fx.Node] = []
    node: Any = index
    while node.target in (*REARRANGING, *CASTS):
        chain.insert(0, node)
        node = node.args[0]
    if node.target is not aten.expand.default:
        return False
    parts: Parts | None = whole_parts(shape_of(node))
    for each in chain:
        parts = None if parts is None else rearranged(parts, each)
    # The operand has the last of the dimensions; of size 1, it is shown again and again.
    own = shape_of(node.args[0])
    new = len(shape_of(node)) - len(own)
    return parts is not None and all(part.dim < new or own[part.dim - new] == 1 for part in parts[-1])


def _counts_images(rows: Any, images: int) -> bool:
    """Return whether `rows` is 0, 1, 2, … for the images, however it is shown: each image picks of its own tokens."""
    while isinstance(rows, fx.Node) and rows.target in _SHOWN:
        rows = rows.args[0]
    if not isinstance(rows, fx.Node) or shape_of(rows) != (images,):
        return False
    if rows.target is aten.arange.default:
        return True
    counted = rows.target in (aten.arange.start, aten.arange.start_step) and rows.args[0] == 0
    return bool(counted) and rows.args[2:3] in ((), (1,))
