"""Attention that is not self-attention over patch tokens, and the reasons that a user reads."""

from __future__ import annotations

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.analysis.marks import MARK
from gtp_fx.errors import Refusal, merged
from gtp_fx.graph.nodes import ancestors, bodies_of, is_input, operator_name, refusal, source_line
from gtp_fx.graph.operators import (
    ATTENTION,
    CASTS,
    CASTS_LIKE,
    CONVOLUTIONS,
    DROPOUTS,
    FEATURE_NORMS,
    FLATTENINGS,
    MATRIX_PRODUCTS,
    PERMUTATIONS,
    PRODUCTS_ADDED_TO,
    REARRANGED,
    SCALINGS,
    SOFTMAXES,
    VIEWS,
    WITHOUT_COPY,
)
from gtp_fx.graph.symbols import shape_of
from gtp_fx.graph.torch_internals import is_higher_order
from gtp_fx.types.axes import TensorType, is_plain, token_axes, token_axis
from gtp_fx.types.infer import WholeTyping
from gtp_fx.types.rules.registry import WEIGHS, TypeList

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
_PRODUCTS = (*MATRIX_PRODUCTS, *PRODUCTS_ADDED_TO, aten.einsum.default)
_ENDS = (*ATTENTION, *CONVOLUTIONS, *FEATURE_NORMS, *SOFTMAXES)
"""Operators with which what is before the logits begins."""
_MOST_BEFORE = 64
"""The most nodes before a softmax that are looked at."""


def unsupported_attention(typing: WholeTyping) -> tuple[Refusal, ...]:
    """Return one refusal for each cause, with the layers that it holds for.

    typing: types of a graph whose blocks are marked.
    """
    found: list[Refusal] = []
    for node in typing.graph.nodes:
        reason = ""
        if node.target in ATTENTION and MARK not in node.meta:
            reason = _why_no_block(node, typing)
        elif node.target in SOFTMAXES and WEIGHS not in node.meta and _feeds_a_product(node):
            reason = _why_not_spelled(node)
        elif is_higher_order(node.target):
            reason = _why_closed(node)
        if reason:
            found.append(refusal(node, reason))
    return merged(found)


def _why_no_block(attention: fx.Node, typing: WholeTyping) -> str:
    """Return why an attention node is no block."""
    answer = typing.results[attention]
    if answer.barrier:
        return answer.barrier
    query, key = attention.args[0], attention.args[1]
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node)
    queries, keys = (token_axis(typing.type(node)[-2]) for node in (query, key))
    if queries is not None and keys is not None:
        return "queries and keys run over different patch tokens"
    merged_here = _merged_tokens(typing.type(query)) or _merged_tokens(typing.type(key))
    if queries is None and keys is None and merged_here:
        return "tokens are divided into windows or groups here, and attention stays inside each"
    # Before anything is said of what they are, look for the operator after which that isn't known.
    for name, node, axis in (("queries", query, queries), ("keys", key, keys)):
        lost = _last_lost(node, typing) if axis is None else None
        if lost is not None and not (name == "queries" and _few(query, key)):
            return (
                f"its {name} come from {operator_name(lost)}{_line(lost)}, after which tokens aren't followed: "
                f"{typing.results[lost].barrier}"
            )
    if keys is not None:
        return (
            "its queries are tokens that are no patches (class or pooling tokens), so there is nothing to remove here; "
            "its keys follow what was removed before"
        )
    if queries is not None:
        return "queries are patch tokens and keys are tokens that are no patches (pooled or of another grid)"
    before = ancestors(attention)
    if said := [node.meta[NO_TOKENS] for node in typing.graph.nodes if node in before and NO_TOKENS in node.meta]:
        return str(said[0])
    if not _has_grid(typing):
        return (
            "nothing here cuts a picture into patches (a convolution, a pooling, or views of an image of [batch, "
            "channels, height, width]), and only patches of a grid are removed"
        )
    return "its queries and keys don't run over patch tokens (but over channels, other inputs or tokens of no grid)"


def _few(query: fx.Node, key: fx.Node) -> bool:
    """Return whether there are fewer queries than keys, as where class or pooling tokens attend to patches."""
    return shape_of(query)[-2] < shape_of(key)[-2]


def _line(node: fx.Node) -> str:
    line = source_line(node)
    return f" [{line}]" if line else ""


def _has_grid(typing: WholeTyping) -> bool:
    """Return whether any value runs over the patches of a grid, or a side of one."""
    return any(not all(map(is_plain, kind)) for kind in typing.types.values() if isinstance(kind, tuple))


def _why_not_spelled(softmax: fx.Node) -> str:
    """Return why a softmax before a product wasn't recognised as attention."""
    if any(user.target in DROPOUTS for user in softmax.users):  # `normalise` has dropped what is off
        return "attention dropout is active, which attention with scores does not have"
    products, others = _logits(softmax)
    if not products:
        return "these weights are no softmax of q·kᵀ (of keys or queries alone, or learned), so they stay as they are"
    if others:
        return (
            f"{operator_name(others[0])}{_line(others[0])} stands between q·kᵀ and this softmax, and isn't known as a "
            f"part of attention: what is added to the logits or masks them can be the attn_mask of "
            f"torch.nn.functional.scaled_dot_product_attention"
        )
    if len(products) > 1:
        return (
            f"the logits of this softmax are made of {len(products)} products and aren't one of them plus a bias (they "
            f"are multiplied with each other, say, or one is read elsewhere too), so this attention stays as it is"
        )
    if products[0].target in PRODUCTS_ADDED_TO:
        return (
            f"its logits are made by {operator_name(products[0])}{_line(products[0])}, which isn't known as q·kᵀ: use "
            f"a matrix product, or torch.nn.functional.scaled_dot_product_attention"
        )
    return "this attention does more than softmax(q·kᵀ)·v (heads mixed, gated, its map used), so it stays as it is"


def _logits(softmax: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """Return the products that a softmax's logits are made of, and what stands between, other than known parts.

    A linear layer is passed only where a product is right before it: there it mixes heads.
    """
    products: list[fx.Node] = []
    others: list[fx.Node] = []
    pending = [node for node in (softmax.args[0],) if isinstance(node, fx.Node)]
    seen: set[fx.Node] = set()
    while pending and len(seen) < _MOST_BEFORE:
        node = pending.pop()
        if node in seen or is_input(node):
            continue
        seen.add(node)
        if node.target in _PRODUCTS:
            products.append(node)
        elif node.target not in _ENDS and (node.target is not aten.linear.default or _is_of_product(node)):
            others += [] if node.target in (*_ELEMENTWISE, *WITHOUT_COPY, *FLATTENINGS, *CASTS, *CASTS_LIKE) else [node]
            pending += node.all_input_nodes
    return products, [node for node in others if any(product in ancestors(node) for product in products)]


def _is_of_product(linear: fx.Node) -> bool:
    """Return whether a linear layer reads a product, through nothing but views and scalings."""
    source: object = linear.args[0]
    while isinstance(source, fx.Node) and source.target in _ELEMENTWISE and source.target is not aten.linear.default:
        source = next((arg for arg in source.args if isinstance(arg, fx.Node)), None)
    return isinstance(source, fx.Node) and source.target in _PRODUCTS


def _why_closed(node: fx.Node) -> str:
    """Return why a higher-order operator hides attention; "" where it is or holds none."""
    held = [call for body in bodies_of(node) for call in body.nodes if call.target in (*ATTENTION, *SOFTMAXES)]
    if not held and "attention" not in operator_name(node):
        return ""
    return (
        "attention inside a higher-order operator, whose function isn't looked into: write it with "
        "torch.nn.functional.scaled_dot_product_attention in the forward itself"
    )


def _merged_tokens(kind: TensorType) -> bool:
    return bool(token_axes(kind))


def _last_lost(node: fx.Node, typing: WholeTyping) -> fx.Node | None:
    """Return the closest operator before `node` that reads patch tokens but isn't known to return any, or None."""
    before = ancestors(node)
    for candidate in reversed(list(node.graph.nodes)):
        answer = typing.results.get(candidate)
        if candidate not in before or answer is None or not answer.barrier or answer.output is None:
            continue
        assert isinstance(candidate, fx.Node)
        tokens_in = any(not all(map(is_plain, kind)) for kind in answer.operands.values())
        kinds = answer.output.items if isinstance(answer.output, TypeList) else (answer.output,)
        if tokens_in and all(all(map(is_plain, kind)) for kind in kinds):
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
