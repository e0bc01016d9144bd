"""Rules for operators that join along an axis or make it longer: cat, stack, padding.

What is joined to patches at either end is prefix and suffix tokens of their axis, which are never removed.
"""

from __future__ import annotations

from dataclasses import replace

from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph.operators import PADDINGS
from gtp_fx.types.axes import (
    Dim,
    Plain,
    TensorType,
    TokenAxis,
    TokenDomain,
    holds_images,
    is_plain,
    plain,
    token_axes,
    token_axis,
    whole_size,
)
from gtp_fx.types.grids import Grid
from gtp_fx.types.rules.broadcasting import join
from gtp_fx.types.rules.grids import is_side, padded
from gtp_fx.types.rules.registry import NEEDS_ALL, Call, NoRule, RuleResult, rule, wanting


@rule(aten.cat.default)
def cat(call: Call) -> RuleResult:
    """Concatenate: parts beside a token axis become its prefix and suffix."""
    # An empty tensor of one dimension is skipped, whatever the others' rank.
    parts = [part for part in call.arg(0) if call.type_of(part) != plain(0)]
    types = [call.type_of(part) for part in parts]
    dim = call.arg(1, 0) % len(types[0])
    joined = types[0]
    for other in types[1:]:
        joined = join(_without(joined, dim), _without(other, dim))
    others = _without(joined, dim)
    along = _concatenate([t[dim] for t in types], call.node.name)
    operands = wanting(
        (part, (*others[:dim], t[dim], *others[dim + 1 :])) for part, t in zip(parts, types, strict=True)
    )
    output = (*others[:dim], along, *others[dim + 1 :])
    follows = None if is_plain(along) else NEEDS_ALL
    return RuleResult(output, operands=operands, prefix_operands=follows, other_images=holds_images(along))


@rule(aten.stack.default)
def stack(call: Call) -> RuleResult:
    """Stack tensors of one joined type along a new, plain dimension."""
    parts = call.arg(0)
    types = [call.type_of(part) for part in parts]
    joined = types[0]
    for other in types[1:]:
        joined = join(joined, other)
    dim = call.arg(1, 0) % (len(joined) + 1)
    # Of two grids, tokens of different images lie side by side; layers of one stream are no more images than before.
    several = len({axis.domain.grid for kind in types for axis in token_axes(kind)}) > 1
    output = (*joined[:dim], (Plain(len(parts), several),), *joined[dim:])
    return RuleResult(output, operands=dict.fromkeys(parts, joined), other_images=several)


@rule(*PADDINGS)
def pad(call: Call) -> RuleResult:
    """Pad plain dimensions, or a grid at its ends. What is added to a token axis becomes prefix and suffix of it."""
    x, amounts = call.type(0), list(call.arg(1))
    dims = [len(x) - 1 - i // 2 for i, amount in enumerate(amounts) if amount]
    if any(is_side(x[dim]) for dim in dims):
        return padded(call, x, amounts)
    shape = call.output_shape()
    output = list(x)
    tokens = False
    for d in dims:
        place = 2 * (len(x) - 1 - d)
        before, after = amounts[place : place + 2]
        axis = token_axis(x[d])
        if not is_plain(x[d]) and (axis is None or min(before, after) < 0):
            raise NoRule("it cuts the token axis, or pads tokens that are merged with something")
        output[d] = (
            (Plain(shape[d]),)
            if axis is None
            else (replace(axis, prefix=axis.prefix + before, suffix=axis.suffix + after),)
        )
        tokens = tokens or axis is not None
    return RuleResult(tuple(output), operands={call.operand(0): x}, prefix_operands=NEEDS_ALL if tokens else None)


def _concatenate(dims: list[Dim], birth: str) -> Dim:
    """Return the concatenated dimension: plain parts before and after a token axis become its prefix and suffix.

    Whole token axes with nothing between their patches become one, over a grid of several, which is named `birth`.
    """
    axes = [i for i, dim in enumerate(dims) if not is_plain(dim)]
    if not axes:
        return (Plain(sum(map(whole_size, dims)), any(map(holds_images, dims))),)
    first, last = axes[0], axes[-1]
    axis = _end_to_end(dims[first : last + 1], birth)
    before, after = sum(map(whole_size, dims[:first])), sum(map(whole_size, dims[last + 1 :]))
    return (replace(axis, prefix=axis.prefix + before, suffix=axis.suffix + after),)


def _end_to_end(dims: list[Dim], birth: str) -> TokenAxis:
    """Return the one axis that token axes are, end to end. Raises NoRule where they have no places of their own."""
    axes = [axis for dim in dims if (axis := token_axis(dim)) is not None]
    if len(axes) != len(dims):
        raise NoRule("patch tokens are joined end to end with others between them")
    if len(axes) == 1:
        return axes[0]
    inside = [axis.suffix for axis in axes[:-1]] + [axis.prefix for axis in axes[1:]]
    grids = [axis.domain.grid for axis in axes]
    if any(inside) or any(axis.domain.level for axis in axes) or any(grid.parts for grid in grids):
        raise NoRule("token axes are joined end to end")
    return TokenAxis(TokenDomain(Grid.of_several(birth, grids)), axes[0].prefix, axes[-1].suffix)


def _without(x: TensorType, dim: int) -> TensorType:
    """Return the type with a dimension of size 1 in place of one of its own."""
    return (*x[:dim], (Plain(1),), *x[dim + 1 :])
