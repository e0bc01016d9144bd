"""Branches: the part of a block that some tokens can skip where the stream has to keep its whole grid.

    x ─┬─ norm ─ MLP ─┬─ add        x ─┬─ kept tokens of each window ─ norm ─ MLP ─ recover ─┬─ add
       └──────────────┘                └─────────────────────────────────────────────────────┘

The attention before the branch ranks the tokens of each window, or of the whole grid where it attends over all of it.
Prefix tokens that each window has (registers, the CLS of a frame) take part in its attention, and never skip a branch.
The branch follows that attention's residual add. It is as much of what runs beside the stream as is token-wise, from
its end backward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.errors import NotApplicable
from gtp_fx.graph.nodes import ancestors, attention_dropout, descendants
from gtp_fx.graph.operators import ATTENTION, NAMED_DIMENSIONS, PERMUTATIONS, REARRANGED
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
from gtp_fx.types.rules.layout import is_view


def with_fewer_dimensions(node: fx.Node) -> tuple[Any, ...]:
    """Return the arguments of a branch's node where tokens have another number of dimensions before the features.

    Dimensions that it names are counted from the end.
    """
    at = NAMED_DIMENSIONS.get(node.target, len(node.args))
    if at >= len(node.args) or node.args[at] is None:
        return node.args
    rank = node.all_input_nodes[0].meta["val"].dim()
    named: Any = node.args[at]
    dims = named % rank - rank if isinstance(named, int) else [dim % rank - rank for dim in named]
    return (*node.args[:at], dims, *node.args[at + 1 :])


@dataclass(frozen=True)
class Branch:
    """The part of one block that only the kept tokens of each window go through.

    entries: the values it starts from.
    inside: its token-wise nodes, in graph order; the last is its result.
    scores: the type of the attention's scores, [images and windows, tokens].
    region: the layout in which tokens are chosen, [images and windows, tokens row by row]; features follow.
    rows: the same with the prefix and suffix tokens that go through the branch beside them; where there are some,
        tokens are in the stream's order.
    windows: number of windows in an image.
    tokens: number of patches in a window.
    attended: number of tokens in a window that attend to each other, those that are no patches among them.
    lead: dimensions of the attention's query that are images and windows.
    heads: the dimension of the query that is heads.
    cells: the shape of the coarser grid that keys are pooled to; () where keys are the tokens themselves.
    apart: prefix and suffix tokens of the image, and of no window, that go through the branch on their own; they are in
        one dimension with the patches.
    """

    entries: tuple[fx.Node, ...]
    inside: tuple[fx.Node, ...]
    scores: TensorType
    region: TensorType
    rows: TensorType
    windows: int
    tokens: int
    attended: int
    lead: tuple[int, ...]
    heads: int
    cells: tuple[int, ...] = ()
    apart: tuple[int, int] = (0, 0)

    @property
    def others(self) -> int:
        """How many tokens of an image go through the branch whichever patches skip it."""
        return self.windows * sum(self.around) + sum(self.apart)

    @property
    def result(self) -> fx.Node:
        """The node whose value is added to the stream."""
        return self.inside[-1]

    @property
    def around(self) -> tuple[int, int]:
        """How many prefix and suffix tokens of each window go through the branch."""
        axis = token_axis(self.rows[1])
        return (0, 0) if axis is None else (axis.prefix, axis.suffix)

    @property
    def order(self) -> tuple[int, ...]:
        """The query's dimensions in the order [images and windows…, heads, tokens, features]."""
        rank = len(self.lead) + 3
        return (*self.lead, self.heads, rank - 2, rank - 1)

    def copied(self, at: Mapping[fx.Node, fx.Node]) -> Branch:
        """Return this branch in a copy of the graph. at: each node's copy."""
        return replace(self, entries=tuple(at[n] for n in self.entries), inside=tuple(at[n] for n in self.inside))


class NoBranch(NotApplicable):
    """Raised where a block has no branch that tokens can skip; the message is the reason that a user reads."""


def find_branch(attention: fx.Node, site: fx.Node, typing: WholeTyping) -> Branch:
    """Find the branch of a block.

    attention: the block's attention, which ranks the tokens.
    site: the residual add after it.

    Raises NoBranch, with the reason, where there is none.
    """
    entries, inside = _next_branch(site, typing)
    result = inside[-1]
    operands = Attention.of(attention)
    query = typing.type(operands.q)
    if attention_dropout(attention):
        raise NoBranch("attention dropout is active, which attention with scores does not have")
    attended = token_axis(query[-2])
    patches = query[-2] if attended is None else (replace(attended, prefix=0, suffix=0),)
    if not all(isinstance(f, GridAxis) for f in split_tokens(patches)):
        raise NoBranch("what attends there is no patches")
    if keys_beside(query, typing.type(operands.k)) not in (None, (0, 0)):
        raise NoBranch("its keys hold more than its tokens")
    lead, heads = _lead_and_heads(query)
    if len(query) > 4 and operands.bias is not None:
        raise NoBranch("its attention has a bias and more than four dimensions")
    scores: TensorType = (tuple(f for dim in lead for f in query[dim]), patches)
    # Scores come in the order of the query's tokens; tokens are chosen in row-by-row order, or in the stream's where
    # others are beside them.
    beside = [axis for axis in token_axes(typing.type(result)[:-1]) if axis.prefix or axis.suffix]
    apart = (0, 0)
    if beside and (attended is None or [axis.domain for axis in beside] != [attended.domain]):
        if len(beside) > 1 or token_axis(typing.type(result)[patches_at(typing.type(result))]) != beside[0]:
            raise NoBranch("tokens that are no patches are merged with something in it")
        apart, beside = (beside[0].prefix, beside[0].suffix), []
    tokens = [f for f in split_tokens(patches) if isinstance(f, GridAxis)]
    if not beside:
        tokens.sort(key=lambda f: (f.side, -f.stride))
    region: TensorType = (scores[0], tuple(tokens))
    rows: TensorType = (scores[0], tuple(beside)) if beside else region
    kinds = [patches_of(typing.type(node)) if any(apart) else typing.type(node) for node in (*entries, result)]
    _check_layouts(scores, region, rows, kinds[:-1], kinds[-1])
    count = whole_size(region[1])
    windows = whole_size(tuple(f for f in split_tokens(scores[0]) if isinstance(f, GridAxis)))
    cells = pooled_to(query, typing.type(operands.k))
    of_window = whole_size(query[-2])
    layouts = (scores, region, rows)
    return Branch(tuple(entries), tuple(inside), *layouts, windows, count, of_window, lead, heads, cells, apart)


def patches_at(kind: TensorType) -> int:
    """Return the dimension in which prefix or suffix tokens stand beside the patches."""
    return next(d for d, dim in enumerate(kind) if any(axis.prefix or axis.suffix for axis in token_axes((dim,))))


def patches_of(kind: TensorType) -> TensorType:
    """Return the type without the prefix and suffix tokens that stand beside the patches."""
    at = patches_at(kind)
    axis = token_axis(kind[at])
    assert axis is not None
    return (*kind[:at], (replace(axis, prefix=0, suffix=0),), *kind[at + 1 :])


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


def _next_branch(site: fx.Node, typing: WholeTyping) -> tuple[list[fx.Node], list[fx.Node]]:
    """Return entries and nodes of the first branch after `site` with a token-wise end, and before the next attention.

    There may be other branches in between that have none, such as a position encoding by convolution, or attention
    that isn't a block's.

    Raises NoBranch.
    """
    after = descendants(site)
    reason = NoBranch("no residual branch follows its attention's")
    for node in site.graph.nodes:
        if node not in after or node.target is not aten.add.Tensor or not typing.is_tensor(node):
            continue
        # An addition closes a branch where one operand, the stream, is what the other was computed from.
        for stream, branch in (node.args[:2], node.args[1::-1]):
            if not isinstance(stream, fx.Node) or not isinstance(branch, fx.Node):
                continue
            start, result = _origin(stream), _origin(branch)
            within = ancestors(result)
            if start not in within or start not in after | {site}:
                continue
            others = [n for n in within & descendants(start) if n.target in ATTENTION]
            if any(token_axis(typing.type(n.args[0])[-2]) is not None for n in others):  # type: ignore[arg-type]
                raise reason
            if others:
                continue  # over the frames of each place, say: the branch that follows it is still this block's
            try:
                return _token_wise_tail(result, after, typing)
            except NoBranch as why:
                reason = why
    raise reason


def _origin(node: fx.Node) -> fx.Node:
    """Return the node whose value `node` holds in another arrangement."""
    while (is_view(node) or node.target in (*PERMUTATIONS, *REARRANGED)) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _token_wise_tail(result: fx.Node, after: set[fx.Node], typing: WholeTyping) -> tuple[list[fx.Node], list[fx.Node]]:
    """Return the longest token-wise part that ends in `result`: its entries and its nodes, in graph order.

    after: the nodes that may be part of it, those after the attention's residual add.

    Raises NoBranch.
    """
    kind = typing.type(result)
    if not is_plain(kind[-1]) or all(map(is_plain, kind[:-1])):
        raise NoBranch("the branch after its attention isn't laid out as tokens with features last")
    lead = kind[:-1]
    inside: list[fx.Node] = []
    entries: list[fx.Node] = []
    for node in reversed(result.graph.nodes):  # users come before their operands
        if node is not result and not any(user in inside for user in node.users):
            continue
        if not _runs_over(node, lead, typing):
            continue  # a parameter, or a table that all tokens share
        # A value that is also read outside the branch has to be computed for every token anyway.
        alone = node is result or all(user in inside for user in node.users)
        part = alone and node in after and _is_token_wise(node, lead, typing)
        (inside if part else entries).append(node)
    if not any(node.target is aten.linear.default for node in inside):
        raise NoBranch("the branch after its attention is not token-wise at its end (a convolution, say)")
    return entries[::-1], inside[::-1]


def _is_token_wise(node: fx.Node, lead: TensorType, typing: WholeTyping) -> bool:
    """Return whether a node computes each token from that token alone.

    Its other operands have to be the same for every token.
    """
    answer = typing.answers.get(node)
    if (
        answer is None
        or answer.barrier
        or answer.prefix_operands is not None
        or answer.repair is not None
        or not answer.operands
    ):
        return False
    if is_view(node) or node.target in (*PERMUTATIONS, *REARRANGED) or not _runs_over(node, lead, typing):
        return False
    others = [n for n in node.all_input_nodes if typing.is_tensor(n) and not _runs_over(n, lead, typing)]
    if node.target is aten.linear.default:
        return node.args[0] not in others
    return all(all(whole_size(dim) == 1 for dim in typing.type(other)[:-1]) for other in others)


def _runs_over(node: fx.Node, lead: TensorType, typing: WholeTyping) -> bool:
    """Return whether a value has the dimensions `lead`, followed by features."""
    return typing.is_tensor(node) and typing.type(node)[:-1] == lead and is_plain(typing.type(node)[-1])


def _lead_and_heads(query: TensorType) -> tuple[tuple[int, ...], int]:
    """Return which dimensions of a query [..., tokens, features] are images and windows, and which one is heads.

    Raises NoBranch.
    """
    before = range(len(query) - 2)
    plain = [d for d in before if d and is_plain(query[d]) and not holds_images(query[d])]
    heads = [d for d in plain if whole_size(query[d]) > 1] or plain[:1]
    lead = tuple(d for d in before if d not in heads)
    if len(heads) != 1 or not lead or any(_mixes(query[d]) for d in lead):
        raise NoBranch("queries have no dimension of their own for heads")
    return lead, heads[0]


def _mixes(dim: Dim) -> bool:
    """Return whether a dimension merges images or windows with something that is neither."""
    return any(isinstance(f, Plain) and not f.images and f.size != 1 for f in dim) and len(dim) > 1


def _check_layouts(
    scores: TensorType, region: TensorType, rows: TensorType, entries: list[TensorType], result: TensorType
) -> None:
    """Raise NoBranch where an entry can't be arranged by window, or the result can't be arranged back.

    The conversions are tried without a graph to emit into.
    """

    def nowhere(*_: object) -> None:
        return None

    try:
        convert(nowhere, None, (*scores, (Plain(1),)), (*region, (Plain(1),)))
        for kind in entries:
            convert(nowhere, None, kind, (*rows, kind[-1]))
        convert(nowhere, None, (*rows, result[-1]), result)
        convert(nowhere, None, (*image_layout(region), (Plain(2),)), by_window(region, (Plain(2),)))
    except NoLayout as reason:
        raise NoBranch(f"its tokens can't be arranged by window: {reason}") from reason
