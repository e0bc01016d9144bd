"""Branches: where a stream has to keep its grid, the part of a block that only some tokens need to go through.

    x ─┬─ norm ─ MLP ─┬─ add        x ─┬─ kept tokens of each window ─ norm ─ MLP ─ recover ─┬─ add
       └──────────────┘                └─────────────────────────────────────────────────────┘

The attention before it ranks the tokens of each window (or of the whole grid, where it sees all). What follows that
attention's residual add is the branch: as much of it, from its end backward, as is token-wise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.errors import NotApplicable
from gtp_fx.graph.nodes import ancestors, attention_dropout, descendants
from gtp_fx.graph.operators import PERMUTATIONS, REARRANGED
from gtp_fx.strategies.protocol import Attention
from gtp_fx.types.axes import (
    Dim,
    GridAxis,
    Plain,
    TensorType,
    holds_images,
    is_plain,
    split_tokens,
    token_axis,
    whole_size,
)
from gtp_fx.types.infer import WholeTyping
from gtp_fx.types.layouts import NoLayout, by_window, convert, image_layout
from gtp_fx.types.rules.layout import is_view


@dataclass(frozen=True)
class Branch:
    """What of one block the kept tokens of each window go through alone.

    entries: the values it begins with. inside: its token-wise nodes, in graph order; the last is its result.
    scores: the type of the attention's scores, [images and windows, tokens]. region: the layout in which tokens are
    chosen, [images and windows, tokens row by row]; features follow. windows: per image. tokens: in each.
    cells: the sides of the coarser grid that keys are pooled to, () where keys are the tokens themselves.
    lead, heads: dimensions of the attention's query that are images and windows, and the one that is heads.
    """

    entries: tuple[fx.Node, ...]
    inside: tuple[fx.Node, ...]
    scores: TensorType
    region: TensorType
    windows: int
    tokens: int
    lead: tuple[int, ...]
    heads: int
    cells: tuple[int, ...] = ()

    @property
    def result(self) -> fx.Node:
        return self.inside[-1]

    @property
    def order(self) -> tuple[int, ...]:
        """The query's dimensions as [images and windows…, heads, tokens, features]."""
        rank = len(self.lead) + 3
        return (*self.lead, self.heads, rank - 2, rank - 1)

    def copied(self, at: Mapping[fx.Node, fx.Node]) -> Branch:
        """The same branch of a copy of the graph. at: each node's copy."""
        return replace(self, entries=tuple(at[n] for n in self.entries), inside=tuple(at[n] for n in self.inside))


class NoBranch(NotApplicable):
    """Why a block has no branch that some tokens can skip; the message is the reason a user reads."""


def find_branch(attention: fx.Node, site: fx.Node, typing: WholeTyping) -> Branch:
    """The branch of the block whose attention ends in the residual add `site`. Raises NoBranch."""
    entries, inside = _next_branch(site, typing)
    result = inside[-1]
    operands = Attention.of(attention)
    query = typing.type(operands.q)
    if attention_dropout(attention):
        raise NoBranch("attention dropout is active, and the scores' attention has none")
    if not all(isinstance(f, GridAxis) for f in split_tokens(query[-2])):
        raise NoBranch("tokens that are no patches attend beside them")
    lead, heads = _lead_and_heads(query)
    if len(query) > 4 and operands.bias is not None:
        raise NoBranch("its attention has a bias and more than four dimensions")
    scores: TensorType = (tuple(f for dim in lead for f in query[dim]), query[-2])
    tokens = sorted((f for f in split_tokens(query[-2]) if isinstance(f, GridAxis)), key=lambda f: (f.side, -f.stride))
    region: TensorType = (scores[0], tuple(tokens))
    _check_layouts(scores, region, [typing.type(node) for node in entries], typing.type(result))
    count = whole_size(region[1])
    windows = whole_size(tuple(f for f in split_tokens(scores[0]) if isinstance(f, GridAxis)))
    cells = pooled_to(query, typing.type(operands.k))
    return Branch(tuple(entries), tuple(inside), scores, region, windows, count, lead, heads, cells)


def pooled_to(query: TensorType, key: TensorType) -> tuple[int, ...]:
    """The sides of the grid that keys are, where it divides the queries'; () where the two are the same tokens, or none."""
    asking, asked = token_axis(query[-2]), token_axis(key[-2])
    if asking is None or asked is None or asking == asked:
        return ()
    if any((asking.prefix, asking.suffix, asked.prefix, asked.suffix)):
        return ()
    grid, cells = asking.domain.grid, asked.domain.grid
    if grid.parts or cells.parts or len(grid.shape) != len(cells.shape):
        return ()
    divides = all(size % count == 0 for size, count in zip(grid.shape, cells.shape, strict=True))
    return cells.shape if divides else ()


def _next_branch(site: fx.Node, typing: WholeTyping) -> tuple[list[fx.Node], list[fx.Node]]:
    """Entries and nodes of the first branch behind `site` that has a token-wise tail, before attention is paid again.

    Between the two may be others that have none: a position encoding by convolution, say.
    """
    behind = descendants(site)
    reason = NoBranch("no residual branch follows its attention's")
    for node in site.graph.nodes:
        if node not in behind or node.target is not aten.add.Tensor or not typing.is_tensor(node):
            continue
        for stream, branch in (node.args[:2], node.args[1::-1]):
            if not isinstance(stream, fx.Node) or not isinstance(branch, fx.Node):
                continue
            start, result = _origin(stream), _origin(branch)
            within = ancestors(result)
            if start not in within or start not in behind | {site}:
                continue
            if any(n.target is aten.scaled_dot_product_attention.default for n in within & descendants(start)):
                raise reason
            try:
                return _token_wise_tail(result, behind, typing)
            except NoBranch as why:
                reason = why
    raise reason


def _origin(node: fx.Node) -> fx.Node:
    """The node whose value, arranged in another way, `node` is."""
    while (is_view(node) or node.target in (*PERMUTATIONS, *REARRANGED)) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _token_wise_tail(result: fx.Node, behind: set[fx.Node], typing: WholeTyping) -> tuple[list[fx.Node], list[fx.Node]]:
    """The values that the longest token-wise part before `result` begins with, and its nodes, both in graph order.

    behind: the nodes that may be part of it, which lie behind the attention's residual add.
    """
    kind = typing.type(result)
    if not is_plain(kind[-1]) or all(map(is_plain, kind[:-1])):
        raise NoBranch("the branch behind its attention isn't laid out as tokens with features last")
    lead = kind[:-1]
    inside: list[fx.Node] = []
    entries: list[fx.Node] = []
    for node in reversed(result.graph.nodes):  # users come before what they use
        if node is not result and not any(user in inside for user in node.users):
            continue
        if not _runs_over(node, lead, typing):
            continue  # parameters, and tables that all tokens share
        # What something else reads as well has to be computed for every token anyway.
        alone = node is result or all(user in inside for user in node.users)
        part = alone and node in behind and _is_token_wise(node, lead, typing)
        (inside if part else entries).append(node)
    if not any(node.target is aten.linear.default for node in inside):
        raise NoBranch("the branch behind its attention is not token-wise at its end (a convolution, say)")
    return entries[::-1], inside[::-1]


def _is_token_wise(node: fx.Node, lead: TensorType, typing: WholeTyping) -> bool:
    """Its result for a token needs that token alone, and what else it reads is the same for all."""
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
    return typing.is_tensor(node) and typing.type(node)[:-1] == lead and is_plain(typing.type(node)[-1])


def _lead_and_heads(query: TensorType) -> tuple[tuple[int, ...], int]:
    """[…, tokens, features]: which of the dimensions before are images and windows, and which one is heads."""
    before = range(len(query) - 2)
    plain = [d for d in before if d and is_plain(query[d]) and not holds_images(query[d])]
    heads = [d for d in plain if whole_size(query[d]) > 1] or plain[:1]
    lead = tuple(d for d in before if d not in heads)
    if len(heads) != 1 or not lead or any(_mixes(query[d]) for d in lead):
        raise NoBranch("queries have no dimension of their own for heads")
    return lead, heads[0]


def _mixes(dim: Dim) -> bool:
    """Images or windows merged with something that is neither."""
    return any(isinstance(f, Plain) and not f.images and f.size != 1 for f in dim) and len(dim) > 1


def _check_layouts(scores: TensorType, region: TensorType, entries: list[TensorType], result: TensorType) -> None:
    """Every value can be arranged by window, and the result back: tried without a graph."""

    def nowhere(*_: object) -> None:
        return None

    try:
        convert(nowhere, None, (*scores, (Plain(1),)), (*region, (Plain(1),)))
        for kind in entries:
            convert(nowhere, None, kind, (*region, kind[-1]))
        convert(nowhere, None, (*region, result[-1]), result)
        convert(nowhere, None, (*image_layout(region), (Plain(2),)), by_window(region, (Plain(2),)))
    except NoLayout as reason:
        raise NoBranch(f"its tokens can't be arranged by window: {reason}") from reason
