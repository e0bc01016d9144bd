"""Branches: the part of a block that some tokens can skip where the stream has to keep its whole grid.

    x ─┬─ norm ─ MLP ─┬─ add        x ─┬─ kept tokens of each window ─ norm ─ MLP ─ recover ─┬─ add
       └──────────────┘                └─────────────────────────────────────────────────────┘

The attention before the branch ranks the tokens of each window, or of the whole grid where it attends over all of it.
The branch follows that attention's residual add. It is as much of what runs beside the stream as is token-wise, from
its end backward, here and at every residual add before the next attention (`branch_parts`). Tokens that are no patches
(registers of a window, the CLS of a frame or of a clip) never skip it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import fx

from gtp_fx.analysis.branch_parts import NoBranch, Part, parts_after
from gtp_fx.graph.nodes import attention_dropout
from gtp_fx.strategies.protocol import Strategy
from gtp_fx.strategies.sites import Attention
from gtp_fx.types.axes import (
    Dim,
    Plain,
    TensorType,
    TokenAxis,
    holds_images,
    is_plain,
    token_axes,
    token_axis,
    whole_size,
)
from gtp_fx.types.grids import GridAxis
from gtp_fx.types.infer import WholeTyping
from gtp_fx.types.layouts import NoLayout, by_window, convert, image_layout
from gtp_fx.types.merging import split_tokens


@dataclass(frozen=True)
class Branch:
    """The part of one block that only the kept tokens of each window go through.

    parts: what they go through, in graph order: the MLP, and any that follow before the next attention.
    scores: the type of the attention's scores, [images and windows, patches].
    region: the layout in which tokens are chosen, [images and windows, patches]; features follow.
    rows: the same with the prefix and suffix tokens that each window has in the branch; where there are some, patches
        are in the branch's own order, and else row by row.
    attended: number of tokens in a window of the attention, those that are no patches among them.
    lead: dimensions of the attention's query that are images and windows.
    heads: the dimension of the query that is heads; none where there is one head without a dimension.
    cells: the shape of the coarser grid that keys are pooled to; () where keys are the tokens themselves.
    apart: prefix and suffix tokens of no window of the attention (the CLS of a clip whose frames it attends in). They
        go through the branch on their own, and are in one dimension with the patches.
    others: how many tokens of an image are no patches and go through the branch, whichever patches skip it.
    stream: the residual stream after the attention, where it holds the patches of the windows and nothing else.
    """

    parts: tuple[Part, ...]
    scores: TensorType
    region: TensorType
    rows: TensorType
    attended: int
    lead: tuple[int, ...]
    heads: tuple[int, ...]
    cells: tuple[int, ...] = ()
    apart: tuple[int, int] = (0, 0)
    others: int = 0
    stream: fx.Node | None = None

    @property
    def windows(self) -> int:
        """The number of windows in an image, of each of which equally many patches skip."""
        return _windows(self.region[0])

    @property
    def tokens(self) -> int:
        """The number of patches in a window."""
        return whole_size(self.region[1])

    @property
    def attentions(self) -> int:
        """The number of windows in which an image's tokens attend; they may be larger than those of the branch."""
        return _windows(self.scores[0])

    @property
    def around(self) -> tuple[int, int]:
        """How many prefix and suffix tokens each window has in the branch."""
        axis = token_axis(self.rows[1])
        return (0, 0) if axis is None else (axis.prefix, axis.suffix)

    @property
    def inside(self) -> tuple[fx.Node, ...]:
        """The nodes of all parts."""
        return tuple(node for part in self.parts for node in part.inside)

    def copied(self, at: Mapping[fx.Node, fx.Node]) -> Branch:
        """Return this branch in a copy of the graph. at: each node's copy."""
        stream = None if self.stream is None else at[self.stream]
        return replace(self, parts=tuple(part.copied(at) for part in self.parts), stream=stream)


def find_branch(attention: fx.Node, site: fx.Node, typing: WholeTyping) -> Branch:
    """Find the branch of a block.

    attention: the block's attention, which ranks the tokens.
    site: the residual add after it.

    Raises NoBranch, with the reason, where there is none.
    """
    first, *later = parts_after(site, typing)
    operands = Attention.of(attention)
    query = typing.type(operands.q)
    if attention_dropout(attention):
        raise NoBranch("attention dropout is active, which attention with scores does not have")
    attended = token_axis(query[-2])
    patches = query[-2] if attended is None else _patches(attended)
    if not all(isinstance(f, GridAxis) for f in split_tokens(patches)):
        raise NoBranch("its queries are merged with something else, or some of them have left")
    if keys_beside(query, typing.type(operands.k)) not in (None, (0, 0)):
        raise NoBranch("its keys hold more than its tokens")
    lead, heads = _lead_and_heads(query)
    scores: TensorType = (tuple(f for dim in lead for f in query[dim]), patches)
    of_first = typing.type(first.result)[:-1]
    region, rows, apart, others = _layouts(scores, of_first)
    _check_layouts(scores, region, rows, patches_of(of_first) if any(apart) else of_first)

    def is_chosen_alike(part: Part) -> bool:
        """Return whether the tokens that a later part keeps can be those of the first one."""
        own = typing.type(part.result)[:-1]
        return own == of_first or (not any(apart) and _fits(scores, region, rows, own))

    parts = (first, *filter(is_chosen_alike, later))
    cells = pooled_to(query, typing.type(operands.k))
    stream = None if others or any(apart) or not _fits(scores, region, region, typing.type(site)[:-1]) else site
    return Branch(parts, scores, region, rows, whole_size(query[-2]), lead, heads, cells, apart, others, stream)


def _layouts(scores: TensorType, lead: TensorType) -> tuple[TensorType, TensorType, tuple[int, int], int]:
    """Return `region`, `rows`, `apart` and `others` of a branch whose values have the dimensions `lead`, and features.

    Raises NoBranch where tokens that are no patches can't be told from the others.
    """
    beside = [axis for axis in token_axes(lead) if axis.prefix or axis.suffix]
    axis = beside[0] if beside else None
    others = 0
    if axis is not None:
        own: Dim = tuple(f for dim in lead for f in dim if f is not axis)
        others = (axis.prefix + axis.suffix) * _windows(own)
        # Of windows within windows, the smaller ones: the tokens of more than one frame aren't ranked together.
        if len(beside) == 1 and whole_size(_patches(axis)) <= whole_size(scores[1]):
            images = _images_first(own)
            return (images, split_tokens(_patches(axis))), (images, (axis,)), (0, 0), others
        if len(beside) > 1 or (axis,) not in lead:
            raise NoBranch("tokens that are no patches are merged with something in it")
    # Scores come in the order of the query's tokens; tokens are chosen in row-by-row order.
    sides = [f for f in split_tokens(scores[1]) if isinstance(f, GridAxis)]
    region = (_images_first(scores[0]), tuple(sorted(sides, key=lambda f: (f.side, -f.stride))))
    return region, region, (0, 0) if axis is None else (axis.prefix, axis.suffix), others


def is_ranked_by_activity(branch: Branch, strategy: Strategy) -> bool:
    """Return whether tokens skip by how far they are from their window's mean, so that attention needn't score them."""
    return strategy.rests_windows and branch.stream is not None


def patches_at(kind: TensorType) -> int:
    """Return the dimension in which prefix or suffix tokens stand beside the patches."""
    return next(d for d, dim in enumerate(kind) if any(axis.prefix or axis.suffix for axis in token_axes((dim,))))


def patches_of(kind: TensorType) -> TensorType:
    """Return the type without the prefix and suffix tokens that stand beside the patches."""
    at = patches_at(kind)
    axis = token_axis(kind[at])
    assert axis is not None
    return (*kind[:at], _patches(axis), *kind[at + 1 :])


def _patches(axis: TokenAxis) -> Dim:
    """Return a dimension of tokens without those before and after the patches."""
    return (replace(axis, prefix=0, suffix=0),)


def _images_first(dim: Dim) -> Dim:
    """Return images and windows with all windows of an image after each other."""
    return tuple(sorted(dim, key=lambda f: not isinstance(f, Plain)))


def _windows(dim: Dim) -> int:
    """Return how many windows of one image a dimension of images and windows runs over."""
    return whole_size(tuple(f for f in split_tokens(dim) if isinstance(f, GridAxis)))


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


def _fits(scores: TensorType, region: TensorType, rows: TensorType, lead: TensorType) -> bool:
    """Return whether values with the dimensions `lead`, and features, can be arranged by window."""
    try:
        _check_layouts(scores, region, rows, lead)
    except NoBranch:
        return False
    return True


def _check_layouts(scores: TensorType, region: TensorType, rows: TensorType, lead: TensorType) -> None:
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
