"""Rules for views: what regroups the entries of all dimensions, in order, into dimensions of other sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph.operators import FLATTENINGS, VIEWS, VIEWS_LIKE
from gtp_fx.graph.symbols import divided, is_symbolic
from gtp_fx.types.axes import (
    CountOf,
    Dim,
    Factor,
    Plain,
    TensorType,
    TokenAxis,
    TokenDomain,
    holds_images,
    is_plain,
    size,
    token_axes,
)
from gtp_fx.types.grids import Grid, GridAxis
from gtp_fx.types.merging import merge_grids, merge_plain, product, split_tokens
from gtp_fx.types.rules.grids import folded
from gtp_fx.types.rules.registry import Call, NoRule, Repair, RuleResult, rule
from gtp_fx.types.rules.unfold import unfolded


@rule(*VIEWS)
def view(call: Call) -> RuleResult:
    """Make each output dimension a product of input factors, found by walking both shapes from the outside in."""
    x = call.type(0)
    born = unfolded(call.node) if all(map(is_plain, x)) else None
    output = regroup(born or [factor for dim in x for factor in split_tokens(dim)], call.output_shape())
    output = folded(output, call.node.name)
    # What all images of a batch are merged with is rows for a matrix product, and is taken apart again.
    own = [any(map(holds_images, output[:place])) for place in range(len(output))]
    output = tuple(_end_to_end(dim, call.node.name) if of else dim for dim, of in zip(output, own, strict=True))
    _require_one_place(output)
    return RuleResult(output, operands={call.operand(0): x}, repair=resize(call, 1, output))


@rule(*FLATTENINGS)
def flatten(call: Call) -> RuleResult:
    """Regroup like a view that works out its sizes itself.

    An operator that names sizes (unflatten) must not name a token count.
    """
    x = call.type(0)
    output = regroup([factor for dim in x for factor in split_tokens(dim)], call.output_shape())
    _require_one_place(output)
    if call.node.target is aten.unflatten.int:
        start = call.arg(1) % len(x)
        if token_axes(output[start : start + len(call.arg(2))]):
            raise NoRule("it names a number of tokens")
    return RuleResult(output, operands={call.operand(0): x})


@rule(*VIEWS_LIKE)
def view_as(call: Call) -> RuleResult:
    """Accept two tensors that run over the same tokens, at every level.

    Otherwise the size of one says nothing about the size of the other.
    """
    x, other = call.type(0), call.type(1)
    output = regroup([factor for dim in x for factor in split_tokens(dim)], call.output_shape())
    if output != other and token_axes((*output, *other)):
        raise NoRule("it takes the shape of a tensor with other tokens")
    return RuleResult(output, operands={call.operand(0): x, call.operand(1): other})


def regroup(factors: Sequence[Factor], shape: Sequence[int]) -> TensorType:
    """Distribute `factors`, outermost first, over the dimensions of `shape`. Raises NoRule where they don't fit.

    A plain factor may be split (1152 = 3x6x64), and so may a side of a grid, into parts (windows). A token axis may
    not, once tokens are removed from it or others are beside them: its parts would have no meaning.
    """
    if 0 in shape:
        raise NoRule("it holds nothing")
    pending = [factor for factor in reversed(merge_plain(factors)) if factor.whole_size != 1]
    dims: list[Dim] = []
    # Fill each dimension from the outermost pending factor; the remainder of a split factor is pending again.
    for wanted in shape:
        taken: list[Factor] = []
        rest = wanted
        while rest != 1:
            if not pending:
                raise NoRule("the view's shape has no match in its input's")
            factor = pending.pop()
            if (fewer := divided(rest, factor.whole_size)) is not None:
                taken.append(factor)
                rest = fewer
            elif isinstance(factor, Plain) and (inner := divided(factor.size, rest)) is not None:
                taken.append(Plain(rest, factor.images))
                pending.append(Plain(inner, factor.images))
                rest = 1
            elif isinstance(factor, GridAxis) and factor.whole_size % rest == 0:
                far, near = factor.split(rest)
                taken.append(far)
                pending.append(near)
                rest = 1
            else:
                grid = isinstance(factor, GridAxis)
                raise NoRule("the view divides a patch grid unevenly" if grid else "the view cuts through a token axis")
        dims.append(merge_grids(product(taken)))
    return tuple(dims)


def resize(call: Call, position: int, output: TensorType) -> Repair | None:
    """Return a repair of the sizes at `position` for dimensions whose size follows the tokens; None without any."""
    following = [d for d, dim in enumerate(output) if token_axes((dim,))]
    if not following:
        return None
    sizes: list[Any] = list(call.arg(position))
    leading = len(output) - len(sizes)
    shape = call.output_shape()

    def repair(count: CountOf) -> tuple[Any, ...]:
        new = list(sizes)
        for d in following:
            if new[d - leading] == -1:
                continue  # the operator works it out itself
            # A symbolic product such as batch*tokens would need arithmetic in the graph; -1 does without.
            new[d - leading] = -1 if is_symbolic(shape[d]) else size(output[d], count)
        if call.node.target is aten.expand.default:
            return call.replace({position: new})  # for expand, -1 keeps the size, so several are allowed
        # A view may have one -1 only: give a number wherever it doesn't depend on a symbol.
        for d in range(leading, len(output)):
            if new.count(-1) > 1 and new[d - leading] == -1 and not is_symbolic(shape[d]):
                new[d - leading] = size(output[d], count)
        if new.count(-1) > 1:
            raise NoRule("two sizes of one view follow symbolic token counts")
        return call.replace({position: new})

    return repair


def _require_one_place(output: TensorType) -> None:
    """Refuse places merged with some images of a batch beside the others, [B * N, F, C] of F frames, once tokens left.

    Each frame has tokens of its own then, so a row of the merged dimension is no longer one place in all of them.
    """
    for dim in output:
        shortened = any(axis.domain.level for axis in token_axes((dim,)))
        if shortened and holds_images(dim) and any(holds_images(other) for other in output if other is not dim):
            raise NoRule("it puts one place of several frames side by side, and each frame keeps tokens of its own")


def _end_to_end(dim: Dim, birth: str) -> Dim:
    """Return the tokens of several images (frames, groups of bands) that follow each other in one sequence as one axis.

    They come image by image, or, place by place, those of all images. Any other dimension is returned as it is. Raises
    NoRule where tokens have been removed, of each image others.
    """
    by_place = len(dim) == 2 and isinstance(dim[0], TokenAxis)
    several, axis = (dim[::-1] if by_place else dim) if len(dim) == 2 else (None, None)
    if not isinstance(several, Plain) or not several.images or is_symbolic(several.size):
        return dim
    if not isinstance(axis, TokenAxis) or axis.prefix or axis.suffix or axis.domain.grid.parts:
        return dim
    if axis.domain.level:
        raise NoRule("it puts the tokens of several images in one sequence, and each keeps tokens of its own")
    grid = Grid.of_several(birth, [axis.domain.grid] * several.size)
    if by_place and not grid.apart:
        raise NoRule("it puts places of several images side by side that aren't known to be on a picture")
    if by_place:
        return merge_grids(tuple(GridAxis(grid, side) for side in (*range(1, len(grid.shape)), 0)))
    return (TokenAxis(TokenDomain(grid)),)


def is_view(node: fx.Node) -> bool:
    """Return whether a node is a view."""
    return node.target in VIEWS
