"""Rules for convolutions and pooling, which work on a grid: where a patch grid is born."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph.operators import CHANNEL_NORMS, CONVOLUTIONS, GRID_MAKERS, RESIZINGS
from gtp_fx.graph.symbols import shape_of
from gtp_fx.types.axes import Plain, TensorType, is_plain, plain, token_axes, whole_size
from gtp_fx.types.grids import Grid, GridAxis
from gtp_fx.types.merging import long_sides, merge_grids, split_tokens
from gtp_fx.types.rules.registry import NEEDS_ALL, Call, NoRule, RuleResult, TypeList, require_plain, rule


@rule(*GRID_MAKERS)
def convolution(call: Call) -> RuleResult:
    """Type [B, C, *sides] -> [B, C', *sides']: a new grid, which becomes a token domain when flattened.

    The input may be an image or an older grid, whole in either case, because a convolution needs every neighbour in
    place. Where it keeps a grid's sides (a position encoding by convolution, a depthwise branch), the grid is still the
    same one.
    """
    x = call.type(0)
    shape = call.output_shape()
    if len(shape) < 3 or len(shape) != len(x) or len(x) != _rank(call.node.target):
        raise NoRule("a grid without a batch")
    if not all(map(is_plain, (x[0], *x[2:]))) and is_pointwise(call.node):  # also over windows that are a batch
        require_plain(x[1:2], "the channels that a convolution mixes")
        return RuleResult((x[0], (Plain(shape[1]),), *x[2:]), operands={call.operand(0): x})
    if not is_plain(x[0]):
        return _within_windows(call, x, shape)
    # Where a whole older grid comes in and keeps its shape, it is still that grid.
    came = [split_tokens(dim) for dim in x[2:]]
    before = {factor.grid for dim in came for factor in dim if isinstance(factor, GridAxis)}
    grid = Grid(call.node.name, shape[2:])
    if len(before) == 1:
        (old,) = before
        as_sides = [side[0] == GridAxis(old, place) or whole_size(side) == 1 for place, side in enumerate(came)]
        grid = old if old.shape == grid.shape and all(as_sides) else grid
    sides = tuple((GridAxis(grid, side),) for side in range(len(grid.shape)))
    output: TensorType = ((Plain(shape[0], images=True),), (Plain(shape[1]),), *sides)
    return RuleResult(output, operands={call.operand(0): x}, barrier="it needs the whole grid")


def _within_windows(call: Call, x: TensorType, shape: tuple[int, ...]) -> RuleResult:
    """Pool each window of a grid by itself: [windows, C, h, w] -> [windows, C', h', w'].

    What is left is one place of each cell: those that are k apart. Raises NoRule where windows aren't made of whole
    cells, or anything else is in the batch.
    """
    windows = [f for f in x[0] if not isinstance(f, Plain)]
    whole = all(isinstance(f, GridAxis) or (isinstance(f, Plain) and f.images) for f in x[0])
    grids = {f.grid for f in windows if isinstance(f, GridAxis)}
    if not whole or len(grids) != 1 or any(grid.shift or grid.parts for grid in grids):
        raise NoRule("a convolution over tokens that were moved into the batch")
    sides = []
    for dim, size in zip(x[2:], shape[2:], strict=True):
        (part,) = dim if len(dim) == 1 else (None,)
        if not isinstance(part, GridAxis) or part.grid not in grids or part.whole_size % size:
            raise NoRule("it pools windows that aren't made of whole cells")
        cell = part.whole_size // size
        sides.append((replace(part, count=size, stride=part.stride * cell),))
    return RuleResult(
        (x[0], (Plain(shape[1]),), *sides), operands={call.operand(0): x}, barrier="it needs the whole grid"
    )


def is_pointwise(node: fx.Node) -> bool:
    """Return whether a convolution mixes channels alone: a kernel of one, one place after the other."""
    if node.target not in CONVOLUTIONS:
        return False
    defaults: list[Any] = [None, [1], [0], [1], 1]
    arguments: list[Any] = [*node.args, *defaults[len(node.args) - 2 :]]
    _, weight, _, stride, padding, _, groups = arguments
    padded = not isinstance(padding, str) and any(padding)  # "same" of a kernel of one is none
    one = all(size == 1 for size in shape_of(weight)[2:])
    return one and not node.kwargs and set(stride) == {1} and not padded and bool(groups == 1)


@rule(aten.im2col.default)
def columns(call: Call) -> RuleResult:
    """Type F.unfold, [B, C, h, w] -> [B, C·k·k, rows·columns]: the patches of a new grid, in a row."""
    x = call.type(0)
    if len(x) != 4 or not is_plain(x[0]):
        raise NoRule("a grid without a batch")
    counts = [
        (whole_size(x[2 + side]) + 2 * call.arg(3)[side] - call.arg(2)[side] * (call.arg(1)[side] - 1) - 1)
        // call.arg(4)[side]
        + 1
        for side in range(2)
    ]
    shape = call.output_shape()
    grid = Grid(call.node.name, tuple(counts))
    patches = merge_grids(tuple(long_sides(grid)))
    output: TensorType = ((Plain(shape[0], images=True),), (Plain(shape[1]),), patches)
    return RuleResult(output, operands={call.operand(0): x}, barrier="it needs the whole grid")


@rule(*RESIZINGS)
def resample(call: Call) -> RuleResult:
    """Make a grid of another size. A table that all images share (a position embedding) is no grid of patches."""
    if whole_size(call.type(0)[0]) == 1:
        raise NoRule("it resamples a table")
    return convolution(call)


@rule(*CHANNEL_NORMS)
def channel_norm(call: Call) -> RuleResult:
    """Keep the type, whether statistics are over the grid (group norm) or fixed (batch norm in eval)."""
    x = call.type(0)
    tokens = [dim for dim in x if token_axes((dim,))]
    if call.node.target is aten.group_norm.default:
        require_plain(tokens, "the values that a group norm averages")
    if _own_statistics(call):
        require_plain(tokens, "the values that a batch norm averages")
    require_plain(x[1:2], "the channels of a norm")
    for parameter in call.tensors()[1:]:
        require_plain(call.type_of(parameter), "the parameters of a norm")
    values = call.node.meta["val"]
    several = isinstance(values, list | tuple)  # the result, and statistics that it saves
    output = TypeList((x, *(plain(*value.shape) for value in values[1:]))) if several else x
    averages = call.node.target is aten.group_norm.default or _own_statistics(call)
    whole = averages and not all(map(is_plain, x))  # a map's places, since no tokens are averaged
    return RuleResult(output, operands={call.operand(0): x}, prefix_operands=NEEDS_ALL if whole else None)


def _rank(operator: object) -> int:
    """Return the rank of a batch of images, by the operator's name: 4 for conv2d."""
    name = str(operator)
    return next((int(n) + 2 for n in "123" if f"{n}d" in name), 0)


def _own_statistics(call: Call) -> bool:
    """Return whether batch_norm(x, weight, bias, mean, var, training, …) averages its input, without stored values."""
    return call.node.target is aten.batch_norm.default and (bool(call.arg(5)) or call.arg(3) is None)
