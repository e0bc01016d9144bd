"""Attention that is no block of self-attention over patch tokens, and why: what a refusal tells a person."""

from __future__ import annotations

from dataclasses import replace

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.axes import TensorType, token_axes, token_axis
from gtp_fx.errors import Refusal
from gtp_fx.graphs import ancestors, layer_name, operator_name
from gtp_fx.infer import Typing
from gtp_fx.passes.find_blocks import ATTENTION, MARK

_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.einsum.default)


def other_attention(graph: fx.Graph, typing: Typing) -> tuple[Refusal, ...]:
    """One refusal for each reason, at the first layer it holds for; graph's blocks must be marked."""
    found: dict[str, list[Refusal]] = {}
    for node in graph.nodes:
        reason = ""
        if node.target in ATTENTION and MARK not in node.meta:
            reason = _why_no_block(node, typing)
        elif node.target in _SOFTMAX and _feeds_a_product(node):
            reason = "this attention does more than softmax(q·kᵀ)·v (heads mixed, gated, or its map used), so it stays as it is"
        if reason:
            found.setdefault(reason, []).append(Refusal(layer_name(node), operator_name(node), reason))
    return tuple(_counted(refusals) for refusals in found.values())


def _why_no_block(attention: fx.Node, typing: Typing) -> str:
    answer = typing.answers[attention]
    if answer.barrier:
        return answer.barrier
    query, key = attention.args[0], attention.args[1]
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node)
    asking, asked = (token_axis(typing.type(node)[-2]) for node in (query, key))
    if asked is not None and asking is None:
        return "only tokens that are no patches ask here; it is told which patches are left, and loses none itself"
    if asking is not None and asked is None:
        return "patch tokens ask tokens that are no patches (pooled or of another grid)"
    if asking is not None:
        return "queries and keys run over different patch tokens"
    if _merged_tokens(typing.type(query)) or _merged_tokens(typing.type(key)):
        return "tokens are divided into windows or groups here, and attention stays inside each"
    lost = _last_lost(query, typing) or _last_lost(key, typing)
    if lost is not None:
        return f"its queries come from {operator_name(lost)} ({lost.name}), behind which tokens aren't followed: {typing.answers[lost].barrier}"
    return "its queries and keys don't run over patch tokens (but over channels, say)"


def _merged_tokens(kind: TensorType) -> bool:
    return bool(token_axes(kind))


def _last_lost(node: fx.Node, typing: Typing) -> fx.Node | None:
    """The closest operator above `node` that takes in patch tokens and of whose output nothing is known."""
    before = ancestors(node)
    for candidate in reversed(list(node.graph.nodes)):
        answer = typing.answers.get(candidate)
        if candidate not in before or answer is None or not answer.barrier or not isinstance(answer.output, tuple):
            continue
        assert isinstance(candidate, fx.Node)
        if any(token_axes(kind) for kind in answer.operands.values()) and not token_axes(answer.output):
            return candidate
    return None


def _feeds_a_product(softmax: fx.Node) -> bool:
    """A softmax that weighs values, and not one that makes class probabilities."""
    pending, seen = list(softmax.users), set()
    for _ in range(32):
        if not pending:
            return False
        node = pending.pop()
        if node.target in _PRODUCTS:
            return True
        if node not in seen:
            seen.add(node)
            pending.extend(node.users)
    return False


def _counted(refusals: list[Refusal]) -> Refusal:
    more = len(refusals) - 1
    return replace(refusals[0], reason=refusals[0].reason + (f"; so in {more} more" if more else ""))
