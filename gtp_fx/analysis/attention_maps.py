"""Attention that stays spelled out because it isn't softmax(q·kᵀ)·v alone: its map, read back from the product with v.

    q·kᵀ ─ scale, caps, heads mixed, masks ─ softmax ─ heads mixed, norm over heads, gates ─ map ─ product with v

Whatever stands between works entry by entry, mixes heads, or reads a whole row of the map (a softmax, a row's sum).
So a token that is removed takes its row and its column with it, and what remains is the same attention over fewer
tokens. Weights that don't add up to one, as after a norm over heads, are added up for fewer tokens then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph.operators import MATRIX_PRODUCTS, SOFTMAXES
from gtp_fx.types.axes import TensorType, TokenAxis, holds_images, is_plain, token_axes, token_axis
from gtp_fx.types.infer import WholeTyping

_OVER_ROWS = (*SOFTMAXES, aten.sum.dim_IntList, aten.amax.default, aten.mean.dim)
"""Operators that may read a whole row."""


@dataclass(frozen=True)
class AttentionMap:
    """The map [B, H, N, N] of an attention that is spelled out, as nodes.

    product: map · v, [B, H, N, D].
    logits: q·kᵀ, [B, H, N, N].
    scored: what tokens are ranked by, [B, H, N, N]: the softmax's result, or the map where there is no softmax.
    softmax: the softmax over keys, [B, H, N, N]; None where there is none.
    over_rows: the operators that read whole rows, and the product itself.
    """

    product: fx.Node
    logits: fx.Node
    scored: fx.Node
    softmax: fx.Node | None
    over_rows: tuple[fx.Node, ...]

    def copied(self, at: Mapping[fx.Node, fx.Node]) -> AttentionMap:
        """Return this map in a copy of the graph. at: each node's copy."""
        softmax = None if self.softmax is None else at[self.softmax]
        over_rows = tuple(at[node] for node in self.over_rows)
        return AttentionMap(at[self.product], at[self.logits], at[self.scored], softmax, over_rows)


def find_map(product: fx.Node, typing: WholeTyping) -> AttentionMap | None:
    """Return the map of the attention that ends in `product`; None where it ends in none, or none that is followed."""
    axis = _attended(product, typing)
    if axis is None:
        return None
    region = _region(product, axis, typing)
    # A reduction over heads alone says nothing of other entries of the map.
    over_rows = [n for n in region if n.target in _OVER_ROWS and typing.results[n].prefix_operands is not None]
    logits = [node for node in region if node.target in MATRIX_PRODUCTS and _is_map(node, axis, typing)]
    read_elsewhere = any(user is not product and user not in region for node in region for user in node.users)
    if read_elsewhere or len(logits) != 1 or not _is_by_head(typing.type(logits[0])):
        return None
    if any(typing.results[node].barrier for node in region) or not is_plain(typing.type(_first(logits[0]))[-1]):
        return None
    softmaxes = [node for node in over_rows if node.target in SOFTMAXES]
    if any(not _over_columns(node, typing) for node in over_rows) or len(softmaxes) > 1:
        return None
    softmax = softmaxes[0] if softmaxes else None
    scored = _first(product) if softmax is None else softmax
    return AttentionMap(product, logits[0], scored, softmax, (*over_rows, product))


def _attended(product: fx.Node, typing: WholeTyping) -> TokenAxis | None:
    """Return the tokens of a product of [B, H, N, N] and [B, H, N, D]; None where a node is no such product."""
    if product.target not in MATRIX_PRODUCTS or typing.results[product].barrier:
        return None
    weights, values = (typing.type(node) for node in product.args if isinstance(node, fx.Node))
    if not _is_by_head(weights) or len(values) != len(weights) or not is_plain(values[-1]):
        return None
    rows, columns, summed = (token_axis(dim) for dim in (weights[-2], weights[-1], values[-2]))
    return rows if rows is not None and rows == columns == summed else None


def _is_by_head(kind: TensorType) -> bool:
    """Return whether a type is [images, heads, tokens, tokens]."""
    if len(kind) != 4 or not is_plain(kind[0]) or not is_plain(kind[1]) or holds_images(kind[1]):
        return False
    return token_axis(kind[2]) is not None and token_axis(kind[2]) == token_axis(kind[3])


def _region(product: fx.Node, axis: TokenAxis, typing: WholeTyping) -> set[fx.Node]:
    """Return the nodes from q·kᵀ to the product: those over rows and columns, and what of each row they read."""
    found: set[fx.Node] = set()
    pending = [product.args[0]]
    while pending:
        node = pending.pop()
        if not isinstance(node, fx.Node) or node in found or not typing.is_tensor(node):
            continue
        if _is_map(node, axis, typing):
            found.add(node)
            if node.target not in MATRIX_PRODUCTS:
                pending += node.all_input_nodes
        elif any(_is_map(operand, axis, typing) for operand in node.all_input_nodes if typing.is_tensor(operand)):
            found.add(node)
            pending += node.all_input_nodes
    return found


def _is_map(node: fx.Node, axis: TokenAxis, typing: WholeTyping) -> bool:
    """Return whether a value of all images has a row and a column for each token."""
    kind = typing.type(node)
    return token_axes(kind) == [axis, axis] and any(map(holds_images, kind))


def _over_columns(node: fx.Node, typing: WholeTyping) -> bool:
    """Return whether an operator over rows reads them along the last of four dimensions, and nothing else."""
    dims: object = node.args[1] if len(node.args) > 1 else None
    named = [dims] if isinstance(dims, int) else list(dims) if isinstance(dims, list | tuple) else []
    return _is_by_head(typing.type(_first(node))) and [dim % 4 for dim in named] == [3]


def _first(node: fx.Node) -> fx.Node:
    """Return a node's first argument."""
    first = node.args[0]
    assert isinstance(first, fx.Node)
    return first
