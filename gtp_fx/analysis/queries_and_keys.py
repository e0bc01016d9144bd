"""What the types of an attention's queries and keys say: heads, windows, keys beside the tokens, pooled keys."""

from __future__ import annotations

from gtp_fx.analysis.branch_parts import NoBranch
from gtp_fx.types.axes import Dim, Plain, TensorType, holds_images, is_plain, token_axis, whole_size


def pooled_to(query: TensorType, key: TensorType) -> tuple[int, ...]:
    """Return the shape of the grid that keys are pooled to, where it divides the grid of the queries; else ()."""
    queries, keys = token_axis(query[-2]), token_axis(key[-2])
    if queries is None or keys is None or queries == keys:
        return ()
    if any((queries.prefix, queries.suffix, keys.prefix, keys.suffix)):
        return ()
    grid, cells = queries.domain.grid, keys.domain.grid
    if grid.parts or cells.parts or len(grid.shape) != len(cells.shape):
        return ()
    divides = all(size % count == 0 for size, count in zip(grid.shape, cells.shape, strict=True))
    return cells.shape if divides else ()


def keys_beside(query: TensorType, key: TensorType) -> tuple[int, int] | None:
    """Return how many keys come before and after those of the queries' tokens; None where these aren't among the keys.

    query, key: [..., tokens, features].
    """
    queries, keys = token_axis(query[-2]), token_axis(key[-2])
    if queries is None or keys is None or queries.domain != keys.domain:
        return None
    before, after = keys.prefix - queries.prefix, keys.suffix - queries.suffix
    return (before, after) if min(before, after) >= 0 else None


def lead_and_heads(query: TensorType) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return which dimensions of a query [..., tokens, features] are images and windows, and which one is heads.

    Raises NoBranch.
    """
    before = range(len(query) - 2)
    plain = [d for d in before if d and is_plain(query[d]) and not holds_images(query[d])]
    heads = tuple(d for d in plain if whole_size(query[d]) > 1) or tuple(plain[:1])
    lead = tuple(d for d in before if d not in heads)
    shown = heads or any(holds_images(query[d]) for d in lead)
    if len(heads) > 1 or not lead or not shown or any(_mixes(query[d]) for d in lead):
        raise NoBranch("queries have no dimension of their own for heads")
    return lead, heads


def _mixes(dim: Dim) -> bool:
    """Return whether a dimension merges images or windows with something that is neither."""
    return any(isinstance(f, Plain) and not f.images and f.size != 1 for f in dim) and len(dim) > 1
