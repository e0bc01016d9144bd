"""How types join where tensors are broadcast together."""

from __future__ import annotations

from gtp_fx.types.axes import Dim, Plain, TensorType, holds_images, images_in, is_plain, token_axis, whole_size
from gtp_fx.types.grids import GridAxis
from gtp_fx.types.rules.registry import NoRule


def join(first: TensorType, second: TensorType) -> TensorType:
    """Return the type of two tensors broadcast together: the newer of two levels, and a token axis over a plain size.

    A plain dimension as long as a whole token axis pairs with it index by index (a position embedding). So it is that
    axis at level 0, and whoever rewrites the graph must gather from it. Raises NoRule where the types don't join.
    """
    if images_in(second) > images_in(first):
        first, second = second, first  # of two grids, that of the images and not that of what all of them share
    rank = max(len(first), len(second))
    pad: Dim = (Plain(1),)
    left = (pad,) * (rank - len(first)) + first
    right = (pad,) * (rank - len(second)) + second
    return tuple(_join_dims(a, b) for a, b in zip(left, right, strict=True))


def _join_dims(a: Dim, b: Dim) -> Dim:
    size_a, size_b = whole_size(a), whole_size(b)
    if size_a == 1:
        return a if size_b == 1 and holds_images(a) else b  # a batch of one stays one
    if size_b == 1:
        return a
    if size_a != size_b:
        raise NoRule(f"sizes {size_a} and {size_b} do not broadcast")
    if is_plain(a):
        return a if is_plain(b) and holds_images(a) else b
    if is_plain(b) or a == b:
        return a
    if _sides_of_one_shape(a, b):
        return a
    if _cells_of(b, a):
        return a
    if _cells_of(a, b):
        return b
    axis_a, axis_b = token_axis(a), token_axis(b)
    if axis_a and axis_b and axis_a.pairs_with(axis_b):
        # Another grid of the same shape (a resampled position table, a convolved copy) pairs with this one while it is
        # whole.
        older = min(axis_a.domain.level, axis_b.domain.level)
        if older == 0 or axis_a.domain.grid == axis_b.domain.grid:
            return a if axis_a.domain.level >= axis_b.domain.level else b
    raise NoRule("two different token axes meet")


def _sides_of_one_shape(a: Dim, b: Dim) -> bool:
    """Return whether both are the same whole side of two grids of one shape: of a convolution and a pooling, say."""
    if len(a) != 1 or len(b) != 1 or not isinstance(a[0], GridAxis) or not isinstance(b[0], GridAxis):
        return False
    return (a[0].grid.shape, a[0].side, a[0].count, b[0].count) == (b[0].grid.shape, b[0].side, 0, 0)


def _cells_of(part: Dim, whole: Dim) -> bool:
    """Return whether `part` is one place of each cell along all of a side, and `whole` that side of a smaller grid.

    The first is what pooling within windows leaves, the second what pooling the whole grid makes.
    """
    if len(part) != 1 or len(whole) != 1 or not isinstance(part[0], GridAxis) or not isinstance(whole[0], GridAxis):
        return False
    one, other = part[0], whole[0]
    spans = one.count * one.stride == one.grid.shape[one.side] and one.stride > 1
    return spans and not one.grid.shift and other.count == 0 and one.side == other.side
