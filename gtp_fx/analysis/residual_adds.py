"""Residual adds: the sum that ends an attention's half of a block, and the stream that is its other operand.

    x ──┬─ norm ─ q, k, v ─ attention ─ projection ─ (scale) ─ add
        └──────────────────────────────────── (scale, turn) ────┘

The stream has a fixed share in the sum, so tokens can be removed from the sum as they would be from the stream. That
distinguishes it from a bias or a mask, and from a gate, which `gtp_fx.analysis.token_states` is for.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph.nodes import ancestors, descendants
from gtp_fx.graph.operators import (
    CASTS,
    CASTS_LIKE,
    DROPOUTS,
    PERMUTATIONS,
    RESIDUAL_SUMS,
    SCALINGS,
    VIEWS,
)
from gtp_fx.types.axes import is_plain
from gtp_fx.types.infer import WholeTyping

_SHARES = (*SCALINGS, *CASTS, *CASTS_LIKE, *DROPOUTS, *PERMUTATIONS, *VIEWS, aten.neg.default)
"""Operators that give a fixed multiple of their first operand, however turned, where the others aren't tokens."""


@dataclass(frozen=True)
class Share:
    """A fixed share that a stream has in a sum.

    stream: what the attention was computed from.
    summand: the operand of a sum that is a multiple of it, however turned, or the stream itself.
    """

    stream: fx.Node
    summand: fx.Node


def residual_add(attention: fx.Node, typing: WholeTyping) -> fx.Node | None:
    """Return the residual add after `attention`, or None.

    It is the first sum or difference after the attention in which what the attention was computed from has a fixed
    share: x + y, x - y, 0.9 * x + 0.1 * y, gamma * x + y. Where results of branches beside the attention are added,
    x + y + z, it is the sum with those: in whichever order they are added, it is the same state of the tokens.
    """
    after = descendants(attention)
    nodes: list[fx.Node] = list(attention.graph.nodes)
    for node in nodes:  # in graph order: the first one is the closest
        if node in after and (share := share_in(node, attention, typing)) is not None:
            return _with_branches_beside(node, share.stream, typing)
    return None


def _with_branches_beside(add: fx.Node, stream: fx.Node, typing: WholeTyping) -> fx.Node:
    """Return the last sum of x + y + z + …, given x + y, whose z and others are made of the same x.

    Sums, and what only scales or turns one, may be read more than once, as long as all of it ends in that last sum.
    """
    of_stream, after = descendants(stream), descendants(add)
    kind, total = typing.type(add), add
    sums = {add}
    for node in add.graph.nodes:
        if sums.isdisjoint(node.all_input_nodes):
            continue
        others = [x for x in node.all_input_nodes if x not in sums]
        scaled = (
            node.target in _SHARES and node.args[0] in sums and not any(_runs_over_tokens(x, typing) for x in others)
        )
        # What is added is made of the stream, and of no sum: a later branch reads one. A skip adds the stream itself.
        added = node.target in RESIDUAL_SUMS and all(
            _runs_over_tokens(x, typing) and x not in after and of_stream & (ancestors(x) | {x}) for x in others
        )
        if not scaled and not added:
            break
        closed = all(sums.issuperset(x.users.keys() - {node}) for x in sums)
        sums.add(node)
        if added and closed and typing.type(node) == kind:
            total = node
    return total


def stream_of(add: fx.Node, attention: fx.Node, typing: WholeTyping) -> fx.Node | None:
    """Return the stream that has a fixed share in a sum, the block's input; None where the sum is no residual one."""
    share = share_in(add, attention, typing)
    return None if share is None else share.stream


def share_in(add: fx.Node, attention: fx.Node, typing: WholeTyping) -> Share | None:
    """Return the share in a sum, or in sums that it is of, that doesn't depend on the attention; else None.

    None as well where several values that the attention was computed from have one.
    """
    if add.target not in RESIDUAL_SUMS or not typing.is_tensor(add):
        return None
    before, after = ancestors(attention), descendants(attention) | {attention}
    if add.target is aten.sub.Tensor and add.args[1] in after and len(add.args[1].users) > 1:  # type: ignore[union-attr]
        return None  # half of an interpolation, (x - y) * w + y: its sum is the one that follows
    found: list[Share] = []
    pending = _operands(add)
    while pending:
        summand = pending.pop(0)
        value = _source(summand, before, typing)
        if value is None:
            continue
        if value.target in RESIDUAL_SUMS and value not in before:
            pending += _operands(value)
        elif _runs_over_tokens(value, typing):
            found.append(Share(value, summand))
    return found[0] if len({share.stream for share in found}) == 1 else None


def _operands(add: fx.Node) -> list[fx.Node]:
    """Return the operands of a sum. Of y - x, the stream x isn't one: that is half of x + w * (y - x)."""
    both = add.args[:1] if add.target is aten.sub.Tensor else add.args[:2]
    return [x for x in both if isinstance(x, fx.Node)]


def _source(value: fx.Node, before: set[fx.Node], typing: WholeTyping) -> fx.Node | None:
    """Return what a value is a fixed multiple of, however turned: one of `before`, or a sum; None where it is neither.

    before: the nodes that the attention was computed from.
    """
    while value not in before:
        tokens = [x for x in value.all_input_nodes if _runs_over_tokens(x, typing)]
        # Patches that the attention read, joined with a prefix that it read another way, are the stream as well.
        if value.target is aten.cat.default and len(tokens) == 1 and tokens[0] in before:
            return value
        if value.target in RESIDUAL_SUMS:
            return value
        if value.target not in _SHARES or len(tokens) != 1 or tokens[0] is not value.args[0]:
            return None
        value = tokens[0]
    return value


def _runs_over_tokens(value: fx.Node, typing: WholeTyping) -> bool:
    return typing.is_tensor(value) and not all(map(is_plain, typing.type(value)))
