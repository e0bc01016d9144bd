"""The parts of a branch: stretches of token-wise nodes, each of which ends in what is added to the stream.

x ─┬─ norm ─ MLP ─┬─ add        x ─┬─ convolution ─ linear ─ gelu ─ linear ─┬─ add
   └──── part ────┘                └─────────────── └─────── part ──────────┘
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.errors import NotApplicable
from gtp_fx.graph.nodes import ancestors, descendants, operator_name, source_line
from gtp_fx.graph.operators import (
    ATTENTION,
    CONVOLUTIONS,
    PERMUTATIONS,
    REARRANGED,
    SOFTMAXES,
    TOKEN_WISE_DIMENSIONS,
)
from gtp_fx.types.axes import TensorType, is_plain, token_axis, whole_size
from gtp_fx.types.infer import WholeTyping
from gtp_fx.types.rules.views import is_view


class NoBranch(NotApplicable):
    """Raised where a block has no branch that tokens can skip; the message is the reason that a user reads."""


@dataclass(frozen=True)
class Part:
    """A stretch of token-wise nodes that ends in a result which is added to the stream.

    entries: the values it starts from.
    inside: its nodes, in graph order; the last is its result.
    """

    entries: tuple[fx.Node, ...]
    inside: tuple[fx.Node, ...]

    @property
    def result(self) -> fx.Node:
        """The node whose value is added to the stream."""
        return self.inside[-1]

    def copied(self, at: Mapping[fx.Node, fx.Node]) -> Part:
        """Return this part in a copy of the graph. at: each node's copy."""
        return Part(tuple(at[n] for n in self.entries), tuple(at[n] for n in self.inside))


def with_fewer_dimensions(node: fx.Node) -> tuple[Any, ...]:
    """Return the arguments of a branch's node where tokens have another number of dimensions before the features.

    Dimensions that it names are counted from the end.
    """
    at = TOKEN_WISE_DIMENSIONS.get(node.target, len(node.args))
    if at >= len(node.args) or node.args[at] is None:
        return node.args
    rank = node.all_input_nodes[0].meta["val"].dim()
    named: Any = node.args[at]
    dims = named % rank - rank if isinstance(named, int) else [dim % rank - rank for dim in named]
    return (*node.args[:at], dims, *node.args[at + 1 :])


def parts_after(site: fx.Node, typing: WholeTyping) -> list[Part]:
    """Return the token-wise ends of the branches after `site` and before the next attention, one at least.

    There may be other branches in between that have none, such as a position encoding by convolution, and before the
    first one attention that isn't over patches of one picture, such as that over the frames of each place.

    Raises NoBranch.
    """
    after = descendants(site)
    reason = NoBranch("no residual branch follows its attention's")
    parts: list[Part] = []
    passed: set[fx.Node] = set()
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
            attending = {n for n in within & after if _attends(n, typing)}
            if any(_is_over_patches(n, typing) for n in attending) or (parts and attending - passed):
                return _some(parts, reason)
            if attending & descendants(start):
                continue  # over the frames of each place, say: the branch that follows it is still this block's
            try:
                part = _token_wise_tail(result, after, typing)
            except NoBranch as why:
                reason = why
                continue
            if not any(set(part.inside) & set(other.inside) for other in parts):
                passed = passed or attending
                parts.append(part)
    return _some(parts, reason)


def _some(parts: list[Part], reason: NoBranch) -> list[Part]:
    """Return the parts. Raises NoBranch where there are none."""
    if not parts:
        raise reason
    return parts


def _attends(node: fx.Node, typing: WholeTyping) -> bool:
    """Return whether a node is an attention, or the softmax over tokens of one."""
    if node.target in SOFTMAXES and node in typing.results:
        return typing.results[node].prefix_operands is not None
    return node.target in ATTENTION


def _is_over_patches(node: fx.Node, typing: WholeTyping) -> bool:
    """Return whether the queries of an attention are patches of a picture or a window; of a softmax that is assumed."""
    if node.target in SOFTMAXES:
        return True
    queries = typing.type(node.args[0])  # type: ignore[arg-type]
    return token_axis(queries[-2]) is not None


def _origin(node: fx.Node) -> fx.Node:
    """Return the node whose value `node` holds in another arrangement."""
    while (is_view(node) or node.target in (*PERMUTATIONS, *REARRANGED)) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _token_wise_tail(result: fx.Node, after: set[fx.Node], typing: WholeTyping) -> Part:
    """Return the longest token-wise part that ends in `result`.

    after: the nodes that may be part of it, those after the attention's residual add.

    Raises NoBranch.
    """
    kind = typing.type(result)
    if not is_plain(kind[-1]) or all(map(is_plain, kind[:-1])):
        raise NoBranch(
            _why_whole(result, after, typing)
            or "the branch after its attention isn't laid out as tokens with features last"
        )
    lead = kind[:-1]
    inside: list[fx.Node] = []
    entries: list[fx.Node] = []
    for node in reversed(result.graph.nodes):  # users come before their operands
        if node is not result and not any(user in inside for user in node.users):
            continue
        if not runs_over(node, lead, typing):
            continue  # a parameter, or a table that all tokens share
        # A value that is also read outside the branch has to be computed for every token anyway.
        alone = node is result or all(user in inside for user in node.users)
        part = alone and node in after and is_token_wise(node, lead, typing)
        (inside if part else entries).append(node)
    if not any(node.target is aten.linear.default for node in inside):
        raise NoBranch(
            _why_whole(result, after, typing)
            or "the branch after its attention is not token-wise at its end (a convolution, say)"
        )
    return Part(tuple(entries[::-1]), tuple(inside[::-1]))


def _why_whole(result: fx.Node, after: set[fx.Node], typing: WholeTyping) -> str:
    """Return which operator at the end of a branch needs all of its grid; "" where a product comes after any."""
    node: fx.Node | None = result
    while node is not None and node in typing.results:
        answer = typing.results[node]
        if answer.barrier or (answer.prefix_operands is not None and not is_view(node)):
            line = source_line(node)
            name = operator_name(node) + (f" [{line}]" if line else "")
            return f"the branch after its attention ends in {name}, which needs all of its tokens in their places"
        if node.target in (aten.linear.default, *CONVOLUTIONS):
            break
        node = next((n for n in node.all_input_nodes if n in after), None)
    return ""


def is_token_wise(node: fx.Node, lead: TensorType, typing: WholeTyping) -> bool:
    """Return whether a node computes each token from that token alone.

    Its other operands have to be the same for every token.
    """
    answer = typing.results.get(node)
    if (
        answer is None
        or answer.barrier
        or answer.prefix_operands is not None
        or answer.repair is not None
        or not answer.operands
    ):
        return False
    if is_view(node) or node.target in (*PERMUTATIONS, *REARRANGED) or not runs_over(node, lead, typing):
        return False
    if node.target is aten.index.Tensor:  # it counts its dimensions from the first one
        return False
    others = [n for n in node.all_input_nodes if typing.is_tensor(n) and not runs_over(n, lead, typing)]
    if node.target is aten.linear.default:
        return node.args[0] not in others
    return all(all(whole_size(dim) == 1 for dim in typing.type(other)[:-1]) for other in others)


def runs_over(node: fx.Node, lead: TensorType, typing: WholeTyping) -> bool:
    """Return whether a value has the dimensions `lead`, followed by features."""
    return typing.is_tensor(node) and typing.type(node)[:-1] == lead and is_plain(typing.type(node)[-1])
