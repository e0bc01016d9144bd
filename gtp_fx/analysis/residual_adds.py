"""Residual adds: the sum that ends an attention's half of a block, and the stream that is its other operand.

    x ──┬─ norm ─ q, k, v ─ attention ─ projection ─ (scale) ─ add
        └──────────────────────────────────── (scale, turn) ────┘

The stream has a fixed share in the sum, so tokens can be removed from the sum as they would be from the stream. That
distinguishes it from a bias or a mask, and from a gate, which `gtp_fx.analysis.token_states` is for.
"""

from __future__ import annotations

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph.nodes import ancestors, descendants
from gtp_fx.graph.operators import (
    ATTENTION,
    CASTS,
    CASTS_LIKE,
    DROPOUTS,
    PERMUTATIONS,
    RESIDUAL_SUMS,
    SCALINGS,
    SOFTMAXES,
    VIEWS,
)
from gtp_fx.types.axes import is_plain
from gtp_fx.types.infer import WholeTyping

_SHARES = (*SCALINGS, *CASTS, *CASTS_LIKE, *DROPOUTS, *PERMUTATIONS, *VIEWS, aten.neg.default)
"""Operators that give a fixed multiple of their first operand, however turned, where the others aren't tokens."""


def residual_add(attention: fx.Node, typing: WholeTyping) -> fx.Node | None:
    """Return the residual add after `attention`, or None.

    It is the first sum or difference after the attention in which what the attention was computed from has a fixed
    share: x + y, x - y, 0.9 * x + 0.1 * y, gamma * x + y. Where a parallel attention's result is added next, x + y + z,
    it is the sum with that.
    """
    after = descendants(attention)
    nodes: list[fx.Node] = list(attention.graph.nodes)
    for node in nodes:  # in graph order: the first one is the closest
        if node in after and (stream := stream_of(node, attention, typing)) is not None:
            return _with_parallel_attention(node, stream)
    return None


def _with_parallel_attention(add: fx.Node, stream: fx.Node) -> fx.Node:
    """Return the last sum of x + y + z + …, given x + y, whose z and others attend to the same x."""
    of_stream = descendants(stream)
    while len(add.users) == 1:
        following = next(iter(add.users))
        others = [node for node in following.all_input_nodes if node is not add]
        if following.target is not aten.add.Tensor or len(others) != 1:
            break
        made_of = (ancestors(others[0]) | {others[0]}) & of_stream
        if add in made_of or not any(node.target in (*ATTENTION, *SOFTMAXES) for node in made_of):
            break
        add = following
    return add


def stream_of(add: fx.Node, attention: fx.Node, typing: WholeTyping) -> fx.Node | None:
    """Return the stream that has a fixed share in a sum, the block's input; None where the sum is no residual one."""
    stream = share_in(add, attention, typing)
    before = ancestors(attention)
    # Go back through what only scales or turns: a share of the stream may be computed beside the attention.
    while stream is not None and stream not in before:
        tokens = [x for x in stream.all_input_nodes if typing.is_tensor(x) and not all(map(is_plain, typing.type(x)))]
        # Patches that the attention read, joined with a prefix that it read another way, are the stream as well.
        if stream.target is aten.cat.default and len(tokens) == 1 and tokens[0] in before:
            break
        # Of x + y, where y is a parallel attention's, x has a share.
        if stream.target is aten.add.Tensor and len(sides := [x for x in tokens if x in before]) == 1:
            return sides[0]
        if stream.target not in _SHARES or len(tokens) != 1 or tokens[0] is not stream.args[0]:
            return None
        stream = tokens[0]
    return None if stream is None or all(map(is_plain, typing.type(stream))) else stream


def share_in(add: fx.Node, attention: fx.Node, typing: WholeTyping) -> fx.Node | None:
    """Return the operand of a sum that doesn't depend on the attention, where the other one does; else None."""
    if add.target not in RESIDUAL_SUMS or not typing.is_tensor(add):
        return None
    after = descendants(attention) | {attention}
    operands = [arg for arg in add.args[:2] if isinstance(arg, fx.Node)]
    sides = [arg for arg in operands if arg not in after]
    if len(operands) != 2 or len(sides) != 1 or not typing.is_tensor(sides[0]):
        return None
    if add.target is aten.sub.Tensor and (sides[0] is not operands[0] or len(operands[1].users) > 1):
        return None  # half of an interpolation, x + w * (y - x) or (x - y) * w + y: its sum is the one that follows
    return sides[0]
