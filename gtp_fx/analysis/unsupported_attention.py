"""Attention that is not self-attention over patch tokens, and the reasons that a user reads."""

from __future__ import annotations

from dataclasses import replace

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.analysis.blocks import MARK
from gtp_fx.errors import Refusal
from gtp_fx.graph.nodes import ancestors, operator_name, refusal
from gtp_fx.graph.operators import (
    ATTENTION,
    DROPOUTS,
    MATRIX_PRODUCTS,
    PERMUTATIONS,
    REARRANGED,
    SCALINGS,
    SOFTMAXES,
    VIEWS,
)
from gtp_fx.types.axes import TensorType, is_plain, token_axes, token_axis
from gtp_fx.types.infer import WholeTyping

NO_TOKENS = "gtp_no_tokens"
"""Meta key of an argument [B, N, C] that attention reads: why it isn't taken for tokens."""

_ELEMENTWISE = (
    *VIEWS,
    *PERMUTATIONS,
    *REARRANGED,
    *SCALINGS,
    aten.add.Tensor,
    aten.expand.default,
    aten.linear.default,
    aten.to.dtype,
)
"""Operators that may stand between a product and its softmax; a linear layer there mixes heads."""


def unsupported_attention(typing: WholeTyping) -> tuple[Refusal, ...]:
    """Return one refusal for each reason, at the first layer that it holds for.

    typing: types of a graph whose blocks are marked.
    """
    found: dict[str, list[Refusal]] = {}
    for node in typing.graph.nodes:
        reason = ""
        if node.target in ATTENTION and MARK not in node.meta:
            reason = _why_no_block(node, typing)
        elif node.target in SOFTMAXES and _feeds_a_product(node):
            reason = _why_not_spelled(node)
        if reason:
            found.setdefault(reason, []).append(refusal(node, reason))
    return tuple(_counted(refusals) for refusals in found.values())


def _why_no_block(attention: fx.Node, typing: WholeTyping) -> str:
    """Return why an attention node is no block."""
    answer = typing.answers[attention]
    if answer.barrier:
        return answer.barrier
    query, key = attention.args[0], attention.args[1]
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node)
    queries, keys = (token_axis(typing.type(node)[-2]) for node in (query, key))
    if keys is not None and queries is None:
        return (
            "its queries are tokens that are no patches (class or pooling tokens), so there is nothing to remove here; "
            "its keys follow what was removed before"
        )
    if queries is not None and keys is None:
        return "queries are patch tokens and keys are tokens that are no patches (pooled or of another grid)"
    if queries is not None:
        return "queries and keys run over different patch tokens"
    if _merged_tokens(typing.type(query)) or _merged_tokens(typing.type(key)):
        return "tokens are divided into windows or groups here, and attention stays inside each"
    before = ancestors(attention)
    if said := [node.meta[NO_TOKENS] for node in typing.graph.nodes if node in before and NO_TOKENS in node.meta]:
        return str(said[0])
    lost = _last_lost(query, typing) or _last_lost(key, typing)
    if lost is not None:
        return (
            f"its queries come from {operator_name(lost)} ({lost.name}), after which tokens aren't followed: "
            f"{typing.answers[lost].barrier}"
        )
    return "its queries and keys don't run over patch tokens (but over channels, say)"


def _why_not_spelled(softmax: fx.Node) -> str:
    """Return why a softmax before a product wasn't recognised as attention."""
    if any(user.target in DROPOUTS for user in softmax.users):  # `normalise` has dropped what is off
        return "attention dropout is active, which attention with scores does not have"
    source: object = softmax.args[0]
    while isinstance(source, fx.Node) and source.target in _ELEMENTWISE:
        source = next((arg for arg in source.args if isinstance(arg, fx.Node)), None)
    if isinstance(source, fx.Node) and source.target in (*MATRIX_PRODUCTS, aten.einsum.default):
        return (
            "this attention does more than softmax(q·kᵀ)·v (heads mixed, gated, its map used, a mask by window), "
            "so it stays as it is"
        )
    return "these weights are no softmax of q·kᵀ (of keys or queries alone, or learned), so they stay as they are"


def _merged_tokens(kind: TensorType) -> bool:
    return bool(token_axes(kind))


def _last_lost(node: fx.Node, typing: WholeTyping) -> fx.Node | None:
    """Return the closest operator before `node` that reads patch tokens but isn't known to return any, or None."""
    before = ancestors(node)
    for candidate in reversed(list(node.graph.nodes)):
        answer = typing.answers.get(candidate)
        if candidate not in before or answer is None or not answer.barrier or not isinstance(answer.output, tuple):
            continue
        assert isinstance(candidate, fx.Node)
        tokens_in = any(not all(map(is_plain, kind)) for kind in answer.operands.values())
        if tokens_in and all(map(is_plain, answer.output)):
            return candidate
    return None


def _feeds_a_product(softmax: fx.Node) -> bool:
    """Return whether a softmax feeds a product, as attention's does, and isn't one that makes class probabilities."""
    pending, seen = list(softmax.users), set()
    for _ in range(32):
        if not pending:
            return False
        node = pending.pop()
        if node.target in (*MATRIX_PRODUCTS, aten.einsum.default):
            return True
        if node not in seen:
            seen.add(node)
            pending.extend(node.users)
    return False


def _counted(refusals: list[Refusal]) -> Refusal:
    """Return the first refusal, with the number of layers that share its reason."""
    more = len(refusals) - 1
    return replace(refusals[0], reason=refusals[0].reason + (f" (and {more} more like it)" if more else ""))
