"""Branches: the part of a block that some tokens can skip where the stream has to keep its whole grid.

    x ─┬─ norm ─ MLP ─┬─ add        x ─┬─ kept tokens of each window ─ norm ─ MLP ─ recover ─┬─ add
       └──────────────┘                └─────────────────────────────────────────────────────┘

The attention before the branch ranks the tokens of each window, or of the whole grid where it attends over all of it.
The branch follows that attention's residual add. It is as much of what runs beside the stream as is token-wise, from
its end backward, here and at every residual add before the next attention (`branch_parts`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import fx

from gtp_fx.analysis.branch_parts import NoBranch, Part, parts_after
from gtp_fx.graph.nodes import attention_dropout
from gtp_fx.strategies.protocol import Attention
from gtp_fx.types.axes import (
    Dim,
    GridAxis,
    Plain,
    TensorType,
    holds_images,
    is_plain,
    split_tokens,
    token_axes,
    token_axis,
    whole_size,
)
from gtp_fx.types.infer import WholeTyping
from gtp_fx.types.layouts import NoLayout, by_window, convert, image_layout


@dataclass(frozen=True)
class Branch:
    """The part of one block that only the kept tokens of each window go through.

    parts: what they go through, in graph order: the MLP, and any that follow before the next attention.
    scores: the type of the attention's scores, [images and windows, tokens].
    region: the layout in which tokens are chosen, [images and windows, patches row by row]; features follow.
    windows: number of windows in an image.
    tokens: number of patches in a window.
    lead: dimensions of the attention's query that are images and windows.
    heads: the dimension of the query that is heads; none where there is one head without a dimension.
    cells: the shape of the coarser grid that keys are pooled to; () where keys are the tokens themselves.
    others: tokens that attend together with the patches and are none.
    beside: tokens before and after the patches of each window in the branch itself. None of them skips it, and where
        there are any, the region is the branch's own layout.
    """

    parts: tuple[Part, ...]
    scores: TensorType
    region: TensorType
    windows: int
    tokens: int
    lead: tuple[int, ...]
    heads: tuple[int, ...]
    cells: tuple[int, ...] = ()
    others: int = 0
    beside: tuple[int, int] = (0, 0)

    @property
    def attending(self) -> int:
        """The number of tokens of one window of the attention, whose windows may be others than the branch's."""
        return whole_size(self.scores[1]) + self.others

    @property
    def attentions(self) -> int:
        """The number of windows in which an image's tokens attend."""
        return _windows(self.scores[0])

    @property
    def inside(self) -> tuple[fx.Node, ...]:
        """The nodes of all parts."""
        return tuple(node for part in self.parts for node in part.inside)

    def copied(self, at: Mapping[fx.Node, fx.Node]) -> Branch:
        """Return this branch in a copy of the graph. at: each node's copy."""
        return replace(self, parts=tuple(part.copied(at) for part in self.parts))


def find_branch(attention: fx.Node, site: fx.Node, typing: WholeTyping) -> Branch:
    """Find the branch of a block.

    attention: the block's attention, which ranks the tokens.
    site: the residual add after it.

    Raises NoBranch, with the reason, where there is none.
    """
    parts = parts_after(site, typing)
    operands = Attention.of(attention)
    query = typing.type(operands.q)
    if attention_dropout(attention):
        raise NoBranch("attention dropout is active, which attention with scores does not have")
    patches = _patches(query[-2])
    if not all(isinstance(f, GridAxis) for f in split_tokens(patches)):
        raise NoBranch("its queries are merged with something else, or some of them have left")
    if keys_beside(query, typing.type(operands.k)) not in (None, (0, 0)):
        raise NoBranch("its keys hold more than its tokens")
    lead, heads = _lead_and_heads(query)
    scores: TensorType = (tuple(f for dim in lead for f in query[dim]), patches)
    result = typing.type(parts[0].result)
    beside = _beside(result)
    if any(beside):
        region = _own_region(result)
        _check_layouts(scores, region, [])
    else:
        # Scores come in the order of the query's tokens; tokens are chosen in row-by-row order.
        sides = [f for f in split_tokens(patches) if isinstance(f, GridAxis)]
        in_rows = sorted(sides, key=lambda f: (f.side, -f.stride))
        region = (scores[0], tuple(in_rows))
        _check_layouts(scores, region, _values(parts[0], typing))
    parts = [parts[0], *(part for part in parts[1:] if _is_chosen_alike(part, parts[0], scores, region, typing))]
    count = whole_size(region[1])
    cells = pooled_to(query, typing.type(operands.k))
    others = whole_size(query[-2]) - whole_size(patches)
    windows = _windows(region[0])
    return Branch(tuple(parts), scores, region, windows, count, lead, heads, cells, others, beside)


def _values(part: Part, typing: WholeTyping) -> list[TensorType]:
    """Return the types of the values that are arranged by window."""
    return [typing.type(node) for node in (*part.entries, part.result)]


def _is_chosen_alike(part: Part, first: Part, scores: TensorType, region: TensorType, typing: WholeTyping) -> bool:
    """Return whether the tokens that a later part keeps can be those of the first one."""
    lead, of_first = (typing.type(of.result)[:-1] for of in (part, first))
    if lead == of_first:
        return True
    try:
        _check_layouts(scores, region, _values(part, typing))
    except NoBranch:
        return False
    return not any(_beside(lead)) and not any(_beside(of_first))


def _windows(dim: Dim) -> int:
    """Return how many windows of one image a dimension of images and windows runs over."""
    return whole_size(tuple(f for f in split_tokens(dim) if isinstance(f, GridAxis)))


def _patches(dim: Dim) -> Dim:
    """Return a dimension of tokens without those before and after the patches."""
    axis = token_axis(dim)
    return dim if axis is None else (replace(axis, prefix=0, suffix=0),)


def _beside(result: TensorType) -> tuple[int, int]:
    """Return how many tokens stand before and after the patches of each window in a branch."""
    axes = token_axes(result)
    return (axes[0].prefix, axes[0].suffix) if len(axes) == 1 else (0, 0)


def _own_region(result: TensorType) -> TensorType:
    """Return the layout [images and windows, patches] of a branch [images and windows, tokens, features].

    Raises NoBranch where it is laid out otherwise.
    """
    patches = [split_tokens(_patches(dim)) for dim in result[1:2]]
    if len(result) != 3 or _mixes(result[0]) or not all(isinstance(f, GridAxis) for dim in patches for f in dim):
        raise NoBranch("the branch after its attention isn't [windows, tokens, features], and has tokens of no patch")
    return result[0], patches[0]


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


def _lead_and_heads(query: TensorType) -> tuple[tuple[int, ...], tuple[int, ...]]:
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


def _check_layouts(scores: TensorType, region: TensorType, values: list[TensorType]) -> None:
    """Raise NoBranch where scores, or one of the branch's values, can't be arranged by window, or not back.

    The conversions are tried without a graph to emit into.
    """

    def nowhere(*_: object) -> None:
        return None

    try:
        convert(nowhere, None, (*scores, (Plain(1),)), (*region, (Plain(1),)))
        for kind in values:
            convert(nowhere, None, kind, (*region, kind[-1]))
            convert(nowhere, None, (*region, kind[-1]), kind)
        convert(nowhere, None, (*image_layout(region), (Plain(2),)), by_window(region, (Plain(2),)))
    except NoLayout as reason:
        raise NoBranch(f"its tokens can't be arranged by window: {reason}") from reason
