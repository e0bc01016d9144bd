"""The attention half of a block that some tokens can skip: their queries and their part of the output projection.

    x ─┬─ norm ─┬─ q of kept tokens ─ attention ─ projection ─ recover ─┬─ add ─ (the branch behind it, kept tokens alone)
       │        └─ k, v of all tokens ──┘                               │
       └────────────────────────────────────────────────────────────────┘

A token that skips is still attended to. Which ones do has to be known before, so the block before ranks them, over the same
grid: by an attention that is whole. So blocks take turns: one whole, which ranks for itself and the next, one partial.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from gtp_fx.axes import Dim, Grid, Plain, TensorType, is_plain, split_tokens, whole_size
from gtp_fx.branches import Branch, is_token_wise
from gtp_fx.errors import Refusal
from gtp_fx.features import Lost, are_last, features_of, is_move, moved, named, parts_in
from gtp_fx.graphs import ancestors, operator_name, refusal
from gtp_fx.infer import Typing
from gtp_fx.layouts import NoLayout, arrange, base_of, convert
from gtp_fx.passes.find_blocks import AttentionBlock
from gtp_fx.queries import Projection, find_projection
from gtp_fx.strategies.protocol import Attention, Strategy


@dataclass(frozen=True)
class AttentionHalf:
    """What of the attention `node` the kept tokens alone go through.

    lender: the block before, whose scores rank the tokens; lent: their type. projection: of which queries are made for the
    kept ones alone; None where all queries are made, since something else reads them, and the kept ones taken.
    asks: the type of the queries; answers: of what the attention returns; heads and features of a head named in both.
    gathered: how the first layer behind has these in its last dimension. inside: what is computed behind, token by token, up to
    `result`, which the residual add reads.
    """

    node: fx.Node
    lender: int
    lent: TensorType
    projection: Projection | None
    asks: TensorType
    answers: TensorType
    gathered: Dim
    inside: tuple[fx.Node, ...]
    result: fx.Node


class NoHalf(Exception):
    """Why an attention has no half that tokens can skip; the message is the reason a user reads."""


@dataclass(frozen=True)
class Turns:
    """halves: by block, for those whose attention is partial. refusals: blocks whose turn it was and that can't be."""

    halves: dict[int, AttentionHalf]
    refusals: tuple[Refusal, ...] = ()


def take_turns(blocks: Sequence[AttentionBlock], typing: Typing, strategy: Strategy) -> Turns:
    """Which blocks' attention kept tokens go through alone, by whose scores."""
    halves: dict[int, AttentionHalf] = {}
    refusals = []
    whole: dict[Grid, AttentionBlock] = {}
    if not strategy.skips_attention:
        return Turns({})
    for block in blocks:
        if block.branch is None:
            continue
        grid = base_of(block.axis.domain.grid)
        before = whole.pop(grid, None)
        if before is not None:
            assert before.branch is not None
            try:
                halves[block.index] = find_half(block, block.branch, before, before.branch, typing)
                continue
            except NoHalf as reason:
                why = f"tokens skip what follows it and not this attention: {reason}"
                refusals.append(refusal(block.attention, why))
        whole[grid] = block
    return Turns(halves, tuple(refusals))


def find_half(
    block: AttentionBlock, branch: Branch, lender: AttentionBlock, lending: Branch, typing: Typing
) -> AttentionHalf:
    """The half of `block` that tokens can skip by the scores of `lender`. Raises NoHalf."""
    attention, site = block.attention, block.site
    assert site is not None
    operands = Attention.of(attention)
    if lender.site not in ancestors(attention):
        raise NoHalf("the block before it, by whose scores they would, is none that it comes from")
    canonical = branch.order == (0, 1, 2, 3)
    if operands.bias is not None and not (canonical and split_tokens(branch.scores[1]) == branch.region[1]):
        raise NoHalf("its bias can't be arranged as the tokens of a window are, row by row")
    try:
        projection, asks = _queries(attention, branch, canonical, typing)
        answers, gathered, inside, result = _behind(attention, site, branch, typing)
        _check_layouts(lending, branch, projection, asks, answers, result, gathered, typing)
    except (Lost, NoLayout) as reason:
        raise NoHalf(str(reason)) from reason
    return AttentionHalf(attention, lender.index, lending.scores, projection, asks, answers, gathered, inside, result)


def _queries(
    attention: fx.Node, branch: Branch, canonical: bool, typing: Typing
) -> tuple[Projection | None, TensorType]:
    query = attention.args[0]
    assert isinstance(query, fx.Node)
    try:
        projection = find_projection(attention, canonical, typing)
        if not _lie_in_heads(projection.kind, branch, projection.features):
            raise Lost("features of its queries lie among their tokens")
        return projection, projection.kind
    except Lost:
        return None, _named_heads(typing.type(query), branch, query)[0]


def _named_heads(kind: TensorType, branch: Branch, birth: fx.Node) -> tuple[TensorType, Grid]:
    dims = [branch.heads, len(kind) - 1]
    features = features_of(birth, whole_size(kind[dims[0]]) * whole_size(kind[dims[1]]))
    return named(kind, dims, features), features


def _lie_in_heads(kind: TensorType, branch: Branch, features: Grid) -> bool:
    """All of them in the dimensions of heads and of features."""
    inside = [f for dim in (kind[branch.heads], kind[-1]) for f in parts_in(dim, features)]
    return math.prod(f.whole_size for f in inside) == features.shape[0]


def _behind(
    attention: fx.Node, site: fx.Node, branch: Branch, typing: Typing
) -> tuple[TensorType, Dim, tuple[fx.Node, ...], fx.Node]:
    """The path from an attention to its residual add."""
    answers, features = _named_heads(typing.type(attention), branch, attention)
    kind = answers
    gathered: Dim | None = None
    inside: list[fx.Node] = []
    node = attention
    while True:
        if len(node.users) != 1:
            raise Lost(f"{node.name}, behind it, is read by something else as well")
        (user,) = node.users
        if user is site:
            break
        if is_move(user):
            kind = moved(user, kind, typing)
        else:
            if not _is_token_wise_in(user, node, typing):
                raise Lost(f"{operator_name(user)} behind it is not token-wise")
            if any(parts_in(dim, features) for dim in kind[:-1]):
                raise Lost("heads are no features yet where a layer follows it")
            if gathered is None:
                gathered = kind[-1]
            elif not are_last(kind, features):
                raise Lost("features are rearranged between two layers behind it")
            inside.append(user)
            kind = typing.type(user)
            features = features_of(user, whole_size(kind[-1]))
            kind = named(kind, [len(kind) - 1], features)
        node = user
    if gathered is None or not are_last(kind, features) or not is_plain(typing.type(node)[-1]):
        raise Lost("no projection follows it that has features last")
    return answers, gathered, tuple(inside), node


def _is_token_wise_in(node: fx.Node, operand: fx.Node, typing: Typing) -> bool:
    """Token by token of `operand`, and of no other tokens beside it."""
    if not typing.is_tensor(node) or not is_plain(typing.type(node)[-1]) or _running(node, typing) != [operand]:
        return False
    return is_token_wise(node, typing.type(node)[:-1], typing)


def data_of(node: fx.Node, typing: Typing) -> fx.Node:
    """The one operand of a node of `inside` that runs over its tokens."""
    (operand,) = _running(node, typing)
    return operand


def _running(node: fx.Node, typing: Typing) -> list[fx.Node]:
    lead = typing.type(node)[:-1]
    return [n for n in node.all_input_nodes if typing.is_tensor(n) and typing.type(n)[:-1] == lead]


def _check_layouts(
    lending: Branch,
    branch: Branch,
    projection: Projection | None,
    asks: TensorType,
    answers: TensorType,
    result: fx.Node,
    gathered: Dim,
    typing: Typing,
) -> None:
    """Everything can be arranged as it has to be: tried without a graph. Raises NoLayout."""

    def nowhere(*_: object) -> None:
        return None

    one: Dim = (Plain(1),)
    convert(nowhere, None, (*lending.scores, one), (*branch.region, one))
    rows, _ = branch.region
    kept: TensorType = ((Plain(whole_size(rows), images=True),), (Plain(branch.tokens),))
    if projection is None:
        arrange(nowhere, None, asks, (rows, asks[branch.heads], branch.region[1], asks[-1]))
    else:
        entry = typing.type(projection.entry)
        convert(nowhere, None, entry, (*branch.region, entry[-1]))
        made = named((*kept, (Plain(projection.features.shape[0]),)), [2], projection.features)
        arrange(nowhere, None, made, (kept[0], asks[branch.heads], kept[1], asks[-1]))
    arrange(nowhere, None, (kept[0], answers[branch.heads], kept[1], answers[-1]), (*kept, gathered))
    end = typing.type(result)
    convert(nowhere, None, (*branch.region, end[-1]), end)
