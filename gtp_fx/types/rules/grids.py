"""Rules for operators on a whole grid's sides: rolling, flipping, padding, sampling, folding neighbours into channels.

Windowed transformers roll and pad a grid before they divide it, and undo both afterwards. Pyramids sample every second
patch, fold 2 x 2 patches into the channels of one, or take their maximum, which makes a new, smaller grid.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.types.axes import (
    Dim,
    Factor,
    Plain,
    TensorType,
    TokenAxis,
    TokenDomain,
    holds_images,
    is_plain,
    token_axis,
    whole_size,
)
from gtp_fx.types.grids import Grid, GridAxis
from gtp_fx.types.merging import merge_grids, split_tokens
from gtp_fx.types.rules.registry import NEEDS_ALL, Call, NoRule, RuleResult, rule


@rule(aten.roll.default)
def roll(call: Call) -> RuleResult:
    """Make another grid of the same patches, moved; moving them back gives the first one."""
    x, shifts = call.type(0), list(call.arg(1))
    dims = [dim % len(x) for dim in call.arg(2, ())]
    if not dims:
        raise NoRule("it rolls all dimensions as one")
    images = any(holds_images(x[dim]) for dim in dims)
    moved = {dim: shift for dim, shift in zip(dims, shifts, strict=True) if not is_plain(x[dim])}
    if not moved:
        return RuleResult(x, operands={call.operand(0): x}, other_images=images)
    grid = whole_sides(x, moved)
    by = [0] * len(grid.shape)
    for dim, shift in moved.items():
        by[side_of(x[dim]).side] = shift
    output = _with_grid(x, grid, grid.rolled(by))
    return RuleResult(output, operands={call.operand(0): x}, prefix_operands=NEEDS_ALL, other_images=images)


@rule(aten.flip.default)
def flip(call: Call) -> RuleResult:
    """Make another grid of the same patches, some sides of which run backward; flipping them back gives the first one.

    Patches in a row, without prefix or suffix tokens, are flipped along every side.
    """
    x = call.type(0)
    dims = [dim % len(x) for dim in call.arg(1)]
    images = any(holds_images(x[dim]) for dim in dims)
    backward = [dim for dim in dims if not is_plain(x[dim])]
    output = x
    if len(backward) == 1 and (axis := token_axis(x[backward[0]])) is not None:
        grid = axis.domain.grid
        if axis.prefix or axis.suffix or axis.domain.level or grid.parts or grid.picked:
            raise NoRule("it flips prefix tokens and patches together, or patches in an order of their own")
        turned = TokenAxis(TokenDomain(grid.turned(range(len(grid.shape)))))
        output = (*x[: backward[0]], (turned,), *x[backward[0] + 1 :])
    elif backward:
        grid = whole_sides(x, backward)
        output = _with_grid(x, grid, grid.turned(side_of(x[dim]).side for dim in backward))
    follows = NEEDS_ALL if backward else None
    return RuleResult(output, operands={call.operand(0): x}, prefix_operands=follows, other_images=images)


def padded(call: Call, x: TensorType, amounts: list[int]) -> RuleResult:
    """Make a grid with more rows and columns after its own.

    amounts: as in aten.pad, the last dimension first.
    """
    ends = {len(x) - 1 - i // 2: amount for i, amount in enumerate(amounts) if amount and i % 2}
    if any(amount for amount in amounts[::2]) or any(amount < 0 for amount in amounts):
        raise NoRule("it pads a grid in front, or cuts it")
    grid = whole_sides(x, ends)
    shape = list(grid.shape)
    for dim, amount in ends.items():
        shape[side_of(x[dim]).side] += amount
    larger = Grid(call.node.name, tuple(shape), inside=grid)
    return RuleResult(_with_grid(x, grid, larger), operands={call.operand(0): x}, prefix_operands=NEEDS_ALL)


def sampled(call: Call, x: TensorType, dim: int, start: int, stop: int, step: int) -> RuleResult:
    """Take part of one side of a grid: crop the padding, or take every step-th place, which makes a smaller grid."""
    grid = whole_sides(x, [dim])
    side = side_of(x[dim]).side
    size = grid.shape[side]
    if grid.shift or grid.flipped:
        raise NoRule("part of a grid is taken that was rolled or flipped")
    if step == 1 and start == 0 and grid.inside is not None and stop == grid.inside.shape[side]:
        smaller = grid.resized(side, stop)
    elif 0 <= start < step and stop == size:
        shape = (*grid.shape[:side], len(range(start, size, step)), *grid.shape[side + 1 :])
        # Samples that begin at another place pair with these one by one, so both run over the cells of one grid.
        smaller = Grid(f"{grid.birth}_{side}every{step}", shape)
    else:
        raise NoRule(f"places {start} to {stop} of a grid are taken by their position")
    return RuleResult(_with_grid(x, grid, smaller), operands={call.operand(0): x}, prefix_operands=NEEDS_ALL)


def folded(output: TensorType, birth: str) -> TensorType:
    """Replace a grid by the smaller one of its cells, where a view merges the inner parts of its sides with channels.

    In [B, h/2, w/2, 2·2·C], a token is a cell of 2 x 2 patches from then on. Any other `output` is returned as it is.

    birth: the view's name, which names the new grid.
    """
    mixed = [dim for dim in output if not is_plain(dim) and any(isinstance(f, Plain) and not f.images for f in dim)]
    if len(mixed) != 1:
        return output
    inner = {f.side: f for f in mixed[0] if isinstance(f, GridAxis)}
    outer = {f.side: f for dim in output if dim is not mixed[0] for f in dim if isinstance(f, GridAxis)}
    grids = {f.grid for f in (*inner.values(), *outer.values())}
    if len(grids) != 1 or not inner:
        return output
    (grid,) = grids
    sides = range(len(grid.shape))
    if sorted(outer) != list(sides):
        return output
    # Outer and inner parts together have to be each side of the grid, once.
    whole = {side: outer[side].joined(inner[side]) if side in inner else outer[side] for side in sides}
    if any(part != GridAxis(grid, side) for side, part in whole.items()):
        return output
    cells = Grid(birth, tuple(outer[side].whole_size for side in sides))

    def smaller(dim: Dim) -> Dim:
        if dim is mixed[0]:
            return (Plain(whole_size(dim)),)
        return tuple(GridAxis(cells, f.side) if isinstance(f, GridAxis) else f for f in dim)

    return tuple(map(smaller, output))


def pooled(reduced: Sequence[Dim], output: TensorType, birth: str) -> TensorType:
    """Replace a grid by the smaller one of its cells, where a reduction leaves one value for each cell.

    In [B, h/2, w/2, C], the maximum of [B, h/2, 2, w/2, 2, C], a token is a cell of 2 x 2 patches from then on, in
    whatever order cells and patches come. Any other `output` is returned as it is.

    reduced: the dimensions that are gone. birth: the reduction's name, which names the new grid.
    """
    inner = [f for dim in reduced for f in split_tokens(dim)]
    outer = [f for dim in output for f in split_tokens(dim) if isinstance(f, GridAxis)]
    if not all(isinstance(f, GridAxis) for f in inner) or len({f.grid for f in (*inner, *outer)}) != 1 or not outer:  # type: ignore[union-attr]
        return output
    grid = outer[0].grid
    if grid.shift or grid.flipped or grid.picked or grid.parts or grid.inside is not None:
        return output
    strides = []
    for side in range(len(grid.shape)):
        parts = sorted((f for f in outer if f.side == side), key=lambda f: -f.stride)
        # What is left has to be every place that is so far from the next.
        whole: GridAxis | None = parts[0] if parts else None
        for part in parts[1:]:
            whole = None if whole is None else whole.joined(part)
        if whole is None or whole.stride * whole.whole_size != grid.shape[side]:
            return output
        strides.append(whole.stride)
    sizes = [size // stride for size, stride in zip(grid.shape, strides, strict=True)]
    cells = Grid(birth, tuple(sizes), placed=grid.placed, guarded=grid.guarded, apart=grid.apart)

    def smaller(dim: Dim) -> Dim:
        factors = [
            replace(f, grid=cells, count=f.whole_size, stride=f.stride // strides[f.side]).canonical()
            if isinstance(f, GridAxis)
            else f
            for f in split_tokens(dim)
        ]
        return merge_grids(tuple(factors)) if any(isinstance(f, GridAxis) for f in factors) else dim

    return tuple(map(smaller, output))


def whole_sides(x: TensorType, dims: Iterable[int]) -> Grid:
    """Return the grid whose whole sides `dims` are, each in a dimension of its own. Raises NoRule where they aren't."""
    found = [x[dim] for dim in dims]
    if not all(len(dim) == 1 and isinstance(dim[0], GridAxis) and not dim[0].count for dim in found):
        raise NoRule("the sides of a grid aren't whole here, or tokens are merged with something")
    grids = {side_of(dim).grid for dim in found}
    if len(grids) != 1:
        raise NoRule("sides of two grids")
    return grids.pop()


def side_of(dim: Dim) -> GridAxis:
    """Return the one side of a grid that a dimension is."""
    (factor,) = dim
    assert isinstance(factor, GridAxis)
    return factor


def is_side(dim: Dim) -> bool:
    """Return whether a dimension is one side of a grid, or a part of one."""
    return len(dim) == 1 and isinstance(dim[0], GridAxis)


def _with_grid(x: TensorType, old: Grid, new: Grid) -> TensorType:
    """Replace every side of `old` in `x` by that of `new`. Raises NoRule where parts of a side are among them."""
    if any(isinstance(f, GridAxis) and f.grid == old and f.count for dim in x for f in dim):
        raise NoRule("parts of a grid stand beside its whole sides")

    def change(factor: Factor) -> Factor:
        return GridAxis(new, factor.side) if isinstance(factor, GridAxis) and factor.grid == old else factor

    return tuple(tuple(map(change, dim)) for dim in x)
