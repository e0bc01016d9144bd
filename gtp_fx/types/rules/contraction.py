"""Rules for weighted sums over a dimension: linear, matrix products, attention."""

from __future__ import annotations

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph.operators import CASTS, DROPOUTS, MATRIX_PRODUCTS, REARRANGED, SOFTMAXES, VIEWS
from gtp_fx.types.axes import Dim, Plain, TensorType, images_in, is_plain, token_axes, whole_size
from gtp_fx.types.rules.broadcasting import join
from gtp_fx.types.rules.pointwise import broadcast_to
from gtp_fx.types.rules.registry import (
    NEEDS_ALL,
    WEIGHS,
    Call,
    NoRule,
    RuleResult,
    require_own_images,
    require_plain,
    rule,
    wanting,
)


@rule(aten.linear.default)
def linear(call: Call) -> RuleResult:
    """Type x[..., in] -> [..., out]: token-wise, unless the features are tokens (as in an MLP-Mixer)."""
    x = call.type(0)
    require_plain(x[-1:], "the features that a linear layer mixes")
    require_own_images(x, x[-1:], "the features that a linear layer mixes")
    for parameter in call.tensors()[1:]:
        require_plain(call.type_of(parameter), "the parameters of a linear layer")
    return RuleResult((*x[:-1], (Plain(call.output_shape()[-1]),)), operands={call.operand(0): x})


@rule(*MATRIX_PRODUCTS)
def matmul(call: Call) -> RuleResult:
    """Type a[..., m, k] @ b[..., k, n], or a[..., k] @ b[k].

    A sum over tokens depends on how many remain, so they have to be whole, unless it ends an attention that is spelled
    out.
    """
    a, b = call.type(0), call.type(1)
    if len(a) >= 2 and len(b) == 1:
        require_plain((a[-1], b[0]), "the features that a product with a vector adds up")
        require_own_images(a, a[-1:], "the features that a product with a vector adds up")
        return RuleResult(a[:-1], operands={call.operand(0): a})
    if len(a) < 2 or len(b) < 2:
        raise NoRule("a vector times a matrix is not followed")
    inner = _join_dim(a[-1], b[-2])
    if any(axis.domain.level for axis in token_axes((a[-1], b[-2]))) and WEIGHS not in call.node.meta:
        if _is_softmax(call.operand(0)):
            raise NoRule("it weighs all tokens, and weights for those that are left alone don't add up to one")
        raise NoRule("it adds up tokens, so its value depends on how many are left")
    for own, other in ((a, b), (b, a)):
        require_own_images(
            other, (*own[-2:], inner) if images_in(other) > 1 else (inner,), "the rows or columns of a product"
        )
    batch = join(a[:-2], b[:-2])
    wanted_a = (*broadcast_to(a[:-2], batch), a[-2], inner)
    wanted_b = (*broadcast_to(b[:-2], batch), inner, b[-1])
    node_a, node_b = call.operand(0), call.operand(1)
    # The output's rows need a's rows alone. But where b's columns are tokens too, or tokens are summed over, both
    # operands are needed whole.
    follows = _follows(batch, a[-2], [node_a], [node_a, node_b]) if is_plain(inner) and is_plain(b[-1]) else NEEDS_ALL
    return RuleResult(
        (*batch, a[-2], b[-1]),
        operands=wanting([(node_a, wanted_a), (node_b, wanted_b)]),
        prefix_operands=follows,
        broadcasts=True,
    )


def _follows(batch: TensorType, rows: Dim, first: list[fx.Node], every: list[fx.Node]) -> frozenset[fx.Node]:
    """Return the `prefix_operands` of products with these rows.

    first: the operands that have them. every: all operands, of which each product of the batch has its own.
    """
    if not token_axes(batch):
        return frozenset(first)
    return frozenset(every) if is_plain(rows) else NEEDS_ALL


@rule(aten.scaled_dot_product_attention.default)
def attention(call: Call) -> RuleResult:
    """Type q[..., L, E], k[..., S, E], v[..., S, D], mask[..., L, S] -> [..., L, D].

    Keys and values must be at the same level. An output token needs its own query, and every key and value.
    """
    q, k, v = call.type(0), call.type(1), call.type(2)
    if not all(map(is_plain, (q[-1], k[-1]))):
        raise NoRule("attention over channels: the features of a head are tokens")
    require_plain((v[-1],), "the features of a head")
    keys = _join_dim(k[-2], v[-2])
    if call.arg(5, False):
        raise NoRule("causal attention depends on every token's position")
    if call.arg(7, False):
        raise NoRule("attention with grouped queries is not followed")
    for kind in (k, v):
        require_own_images(kind, (q[-2], keys), "the queries and keys of an attention")
    batch = join(join(q[:-2], k[:-2]), v[:-2])
    wanted: list[tuple[fx.Node, TensorType]] = [
        (call.operand(0), (*broadcast_to(q[:-2], batch), *q[-2:])),
        (call.operand(1), (*broadcast_to(k[:-2], batch), keys, k[-1])),
        (call.operand(2), (*broadcast_to(v[:-2], batch), keys, v[-1])),
    ]
    mask = call.arg(3)
    if mask is not None:
        logits: TensorType = (*batch, q[-2], keys)
        wanted.append((mask, broadcast_to(call.type(3), logits)))
    # A mask with a row for each query has two token axes, so it can't follow the output's tokens: all is needed.
    a_row_per_query = mask is not None and whole_size(call.type(3)[-2]) != 1
    operands = [operand for operand, _ in wanted]
    follows = NEEDS_ALL if a_row_per_query else _follows(batch, q[-2], operands[:1], operands)
    return RuleResult((*batch, q[-2], v[-1]), operands=wanting(wanted), prefix_operands=follows, broadcasts=True)


def _is_softmax(node: fx.Node) -> bool:
    """Return whether the values are attention weights, possibly moved or copied since."""
    while node.target in (*VIEWS, *REARRANGED, *CASTS, *DROPOUTS, aten.expand.default):
        node = node.all_input_nodes[0]
    return node.target in SOFTMAXES and node.args[1] in (-1, node.meta["val"].ndim - 1)


def _join_dim(a: Dim, b: Dim) -> Dim:
    if whole_size(a) != whole_size(b):
        raise NoRule(f"{whole_size(a)} and {whole_size(b)} can't be summed over together")
    return join((a,), (b,))[0]
