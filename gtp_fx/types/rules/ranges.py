"""Rules for operators that pick and cut along an axis: select, slice, unbind, split.

Prefix tokens come first on an axis and are never removed, so an index into them is valid at every level. That is why
`x[:, 0]` can be read after tokens are removed, and how `drop_dead_tokens` finds that nothing else is read.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph.operators import SPLITS
from gtp_fx.types.axes import CountOf, Dim, Plain, TensorType, holds_images, is_plain, size, token_axis, whole_size
from gtp_fx.types.merging import in_rows
from gtp_fx.types.rules.grids import is_side, sampled
from gtp_fx.types.rules.registry import NEEDS_ALL, Call, NoRule, RuleResult, TypeList, rule


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


def _is_number(value: object) -> bool:
    return isinstance(value, int)


def _bound(value: object, default: int, whole: int) -> int:
    """Return a slice's bound as an index from the start, clamped."""
    if value is None:
        return default
    if not isinstance(value, int):
        raise NoRule("a slice with a bound known only when it runs")
    return max(0, min(whole, value + whole if value < 0 else value))
