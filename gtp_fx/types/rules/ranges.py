"""Rules for operators that pick, cut and join along an axis: select, slice, cat, unbind, split.

Prefix tokens come first on an axis and are never removed, so an index into them is valid at every level. That is why
`x[:, 0]` can be read after tokens are removed, and how `drop_dead_tokens` finds that nothing else is read.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph.operators import PADDINGS, SPLITS
from gtp_fx.types.axes import (
    CountOf,
    Dim,
    Plain,
    TensorType,
    TokenAxis,
    TokenDomain,
    holds_images,
    is_plain,
    plain,
    size,
    token_axes,
    token_axis,
    whole_size,
)
from gtp_fx.types.grids import Grid
from gtp_fx.types.merging import in_rows
from gtp_fx.types.rules.grids import is_side, padded, sampled
from gtp_fx.types.rules.registry import NEEDS_ALL, Call, NoRule, RuleResult, TypeList, join, rule, wanting


@rule(operator.getitem)
def getitem(call: Call) -> RuleResult:
    """Take one item of a list of tensors."""
    source = call.node.args[0]
    found = call.types.get(source)  # type: ignore[arg-type]
    if not isinstance(found, TypeList):
        raise NoRule("an item of something that is no list of tensors")
    return RuleResult(found.items[call.node.args[1]])  # type: ignore[index]


@rule(aten.unbind.int)
def unbind(call: Call) -> RuleResult:
    """Remove a plain dimension, one item for each of its entries."""
    x = call.type(0)
    dim = call.arg(1, 0) % len(x)
    if not is_plain(x[dim]):
        raise NoRule("unbinding takes tokens apart")
    item = x[:dim] + x[dim + 1 :]
    items = TypeList((item,) * whole_size(x[dim]))
    return RuleResult(items, operands={call.operand(0): x}, other_images=holds_images(x[dim]))


@rule(*SPLITS)
def split(call: Call) -> RuleResult:
    """Split a plain dimension, or prefix and suffix tokens from patches."""
    x = call.type(0)
    dim = call.arg(2, 0) % len(x)
    if not is_plain(x[dim]):
        return _split_tokens(call, x, dim)
    parts = [value.shape[dim] for value in call.node.meta["val"]]
    if len(parts) == 1:
        return RuleResult(TypeList((x,)), operands={call.operand(0): x})
    images = holds_images(x[dim])
    items = tuple((*x[:dim], (Plain(part, images),), *x[dim + 1 :]) for part in parts)
    return RuleResult(TypeList(items), operands={call.operand(0): x}, other_images=images)


def _split_tokens(call: Call, x: TensorType, dim: int) -> RuleResult:
    """Split prefix tokens, patches and suffix tokens, as rotary embeddings do. Only the patches' part changes size."""
    axis, sizes = token_axis(x[dim]), call.arg(1)
    if axis is None or call.node.target is not aten.split_with_sizes.default or not all(map(_is_number, sizes)):
        raise NoRule("splitting cuts through a token axis")
    parts: list[Dim] = []
    start, patches_end = 0, axis.whole_size - axis.suffix
    # Each part holds all patches or none; whatever lies outside them is plain.
    for part in sizes:
        stop = start + part
        if stop <= axis.prefix or start >= patches_end:
            parts.append((Plain(part),))
        elif start <= axis.prefix and stop >= patches_end:
            parts.append((replace(axis, prefix=axis.prefix - start, suffix=axis.suffix - (axis.whole_size - stop)),))
        else:
            raise NoRule(f"tokens {start} to {stop} are taken by their position")
        start = stop
    items = tuple((*x[:dim], part, *x[dim + 1 :]) for part in parts)

    def resize(count: CountOf) -> tuple[Any, ...]:
        return call.replace({1: [size(part, count) for part in parts]})

    return RuleResult(TypeList(items), operands={call.operand(0): x}, repair=resize, prefix_operands=NEEDS_ALL)


@rule(aten.select.int)
def select(call: Call) -> RuleResult:
    """Take one index along a dimension: of a token axis, only a prefix or a suffix token."""
    x = call.type(0)
    node = call.operand(0)
    dim, index = call.arg(1) % len(x), call.arg(2)
    if not isinstance(index, int):
        raise NoRule("an index known only when it runs")
    output = x[:dim] + x[dim + 1 :]
    if is_plain(x[dim]):
        return RuleResult(output, operands={node: x}, other_images=holds_images(x[dim]))
    axis = token_axis(x[dim])
    if axis is None and whole_size(x[dim]) == 1:
        return RuleResult(in_rows(output), operands={node: x})
    if axis is None:
        raise NoRule("selecting from a merged token axis")
    if 0 <= index < axis.prefix:
        return RuleResult(output, operands={node: x}, prefix_operands=NEEDS_ALL, prefix_needed={node: index + 1})
    if index < 0 and -index <= axis.suffix:
        return RuleResult(output, operands={node: x}, prefix_operands=NEEDS_ALL)
    if index >= axis.whole_size - axis.suffix:
        from_end = index - axis.whole_size
        return RuleResult(
            output, {node: x}, repair=lambda count: call.replace({2: from_end}), prefix_operands=NEEDS_ALL
        )
    raise NoRule(f"one patch token (number {index}) is selected by its position")


@rule(aten.slice.Tensor)
def slice_(call: Call) -> RuleResult:
    """Slice a dimension: of a token axis, prefix tokens, suffix tokens, or all patches with what is around them."""
    x = call.type(0)
    node = call.operand(0)
    dim = call.arg(1, 0) % len(x)
    if is_plain(x[dim]):
        size_taken = call.output_shape()[dim]
        if size_taken == whole_size(x[dim]):
            return RuleResult(x, operands={node: x})
        images = holds_images(x[dim])
        output = (*x[:dim], (Plain(size_taken, images),), *x[dim + 1 :])
        return RuleResult(output, operands={node: x}, other_images=images)
    whole = whole_size(x[dim])
    start, stop = _bound(call.arg(2), 0, whole), _bound(call.arg(3), whole, whole)
    step = call.arg(4, 1)
    if is_side(x[dim]) and (start, stop, step) != (0, whole, 1):
        return sampled(call, x, dim, start, stop, step)
    if step != 1:
        raise NoRule("a strided slice of tokens")
    if (start, stop) == (0, whole):
        return RuleResult(x, operands={node: x}, repair=lambda count: call.replace({3: size(x[dim], count)}))
    axis = token_axis(x[dim])
    if axis is None:
        raise NoRule("slicing a merged token axis")
    patches_end = whole - axis.suffix

    def along(new: Dim) -> TensorType:
        return (*x[:dim], new, *x[dim + 1 :])

    if stop <= axis.prefix:
        # Prefix tokens. A bound may be counted from the end, which moves; counted from the start it doesn't.
        return RuleResult(
            along((Plain(stop - start),)),
            {node: x},
            repair=lambda count: call.replace({2: start, 3: stop}),
            prefix_operands=NEEDS_ALL,
            prefix_needed={node: stop},
        )
    if start >= patches_end:  # suffix tokens, which move forward as patches are removed

        def move(count: CountOf) -> tuple[Any, ...]:
            shift = size(x[dim], count) - whole
            return call.replace({2: start + shift, 3: stop + shift})

        return RuleResult(along((Plain(stop - start),)), {node: x}, repair=move, prefix_operands=NEEDS_ALL)
    if start <= axis.prefix and stop >= patches_end:  # all patches
        cut = replace(axis, prefix=axis.prefix - start, suffix=axis.suffix - (whole - stop))

        def shorten(count: CountOf) -> tuple[Any, ...]:
            return call.replace({2: start, 3: size(x[dim], count) - (whole - stop)})

        return RuleResult(along((cut,)), {node: x}, repair=shorten, prefix_operands=NEEDS_ALL)
    raise NoRule(f"tokens {start} to {stop} are taken by their position")


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


def _is_number(value: object) -> bool:
    return isinstance(value, int)


def _bound(value: object, default: int, whole: int) -> int:
    """Return a slice's bound as an index from the start, clamped."""
    if value is None:
        return default
    if not isinstance(value, int):
        raise NoRule("a slice with a bound known only when it runs")
    return max(0, min(whole, value + whole if value < 0 else value))
