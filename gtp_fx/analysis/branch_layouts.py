"""The layouts of a branch: by window, in which tokens are chosen, with what stands beside the patches or apart."""

from __future__ import annotations

from dataclasses import replace

from gtp_fx.analysis.branch_parts import NoBranch
from gtp_fx.types.axes import Dim, Plain, TensorType, TokenAxis, token_axes, token_axis, whole_size
from gtp_fx.types.grids import GridAxis
from gtp_fx.types.layouts import NoLayout, by_window, convert, image_layout
from gtp_fx.types.merging import split_tokens


def layouts_of(scores: TensorType, lead: TensorType) -> tuple[TensorType, TensorType, tuple[int, int], int]:
    """Return `region`, `rows`, `apart` and `others` of a branch whose values have the dimensions `lead`, and features.

    Raises NoBranch where tokens that are no patches can't be told from the others.
    """
    beside = [axis for axis in token_axes(lead) if axis.prefix or axis.suffix]
    axis = beside[0] if beside else None
    others = 0
    if axis is not None:
        own: Dim = tuple(f for dim in lead for f in dim if f is not axis)
        others = (axis.prefix + axis.suffix) * windows_in(own)
        # Of windows within windows, the smaller ones: the tokens of more than one frame aren't ranked together.
        if len(beside) == 1 and whole_size(without_others(axis)) <= whole_size(scores[1]):
            images = _images_first(own)
            return (images, split_tokens(without_others(axis))), (images, (axis,)), (0, 0), others
        if len(beside) > 1 or (axis,) not in lead:
            raise NoBranch("tokens that are no patches are merged with something in it")
    # Scores come in the order of the query's tokens; tokens are chosen in row-by-row order.
    sides = [f for f in split_tokens(scores[1]) if isinstance(f, GridAxis)]
    region = (_images_first(scores[0]), tuple(sorted(sides, key=lambda f: (f.side, -f.stride))))
    return region, region, (0, 0) if axis is None else (axis.prefix, axis.suffix), others


def fits(scores: TensorType, region: TensorType, rows: TensorType, lead: TensorType) -> bool:
    """Return whether values with the dimensions `lead`, and features, can be arranged by window."""
    try:
        check_layouts(scores, region, rows, lead)
    except NoBranch:
        return False
    return True


def check_layouts(scores: TensorType, region: TensorType, rows: TensorType, lead: TensorType) -> None:
    """Raise NoBranch where scores, or values [*lead, features], can't be arranged by window, or these not back.

    The conversions are tried without a graph to emit into.
    """

    def nowhere(*_: object) -> None:
        return None

    feature, coordinates = (Plain(1),), (Plain(2),)
    try:
        convert(nowhere, None, (*scores, feature), (*region, feature))
        convert(nowhere, None, (*lead, feature), (*rows, feature))
        convert(nowhere, None, (*rows, feature), (*lead, feature))
        convert(nowhere, None, (*image_layout(region), coordinates), by_window(region, coordinates))
    except NoLayout as reason:
        raise NoBranch(f"its tokens can't be arranged by window: {reason}") from reason


def patches_at(kind: TensorType) -> int:
    """Return the dimension in which prefix or suffix tokens stand beside the patches."""
    return next(d for d, dim in enumerate(kind) if any(axis.prefix or axis.suffix for axis in token_axes((dim,))))


def patches_of(kind: TensorType) -> TensorType:
    """Return the type without the prefix and suffix tokens that stand beside the patches."""
    at = patches_at(kind)
    axis = token_axis(kind[at])
    assert axis is not None
    return (*kind[:at], without_others(axis), *kind[at + 1 :])


def without_others(axis: TokenAxis) -> Dim:
    """Return a dimension of tokens without those before and after the patches."""
    return (replace(axis, prefix=0, suffix=0),)


def _images_first(dim: Dim) -> Dim:
    """Return images and windows with all windows of an image after each other."""
    return tuple(sorted(dim, key=lambda f: not isinstance(f, Plain)))


def windows_in(dim: Dim) -> int:
    """Return how many windows of one image a dimension of images and windows runs over."""
    return whole_size(tuple(f for f in split_tokens(dim) if isinstance(f, GridAxis)))
