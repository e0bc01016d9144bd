"""By what a block computes its queries, and its keys, where queries have an input of their own (`keys_apart`).

Computed once more, each from the other's input, they make a map of all tokens that a site had over those that it left:

    x ── norm ─ q          queries of what enters the site
    x' ─ norm ─ k          keys of what is left there
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from gtp_fx.analysis.blocks import AttentionBlock
from gtp_fx.analysis.fused_projections import rows_for
from gtp_fx.graph.nodes import ancestors, descendants
from gtp_fx.graph.symbols import shape_of
from gtp_fx.strategies.sites import OWN_QUERIES, Attention


@dataclass(frozen=True)
class OwnQueries:
    """What makes a block's queries and keys.

    own: the input that queries are computed from, after which a site can stand.
    stream: the input that keys are computed from, the same value under another name.
    queries, keys: the nodes between these and the attention's queries and keys, in graph order; the last are those.
    rows_for_keys: of each projection that makes keys and values at once, how many rows make keys.
    """

    own: fx.Node
    stream: fx.Node
    queries: tuple[fx.Node, ...]
    keys: tuple[fx.Node, ...]
    rows_for_keys: Mapping[fx.Node, int]


def own_queries(block: AttentionBlock) -> OwnQueries | None:
    """Return what makes a block's queries and keys; None where queries have no input of their own."""
    own = block.stream
    if own is None or OWN_QUERIES not in own.meta:
        return None
    (stream,) = own.all_input_nodes
    operands = Attention.of(block.attention)
    queries, keys = _between(own, operands.q), _between(stream, operands.k)
    return OwnQueries(own, stream, queries, keys, rows_for(keys))


def why_no_map(attention: fx.Node, stream: fx.Node) -> str:
    """Return why no map of a block's tokens over those that a site leaves can be made; empty where it can.

    stream: [B, N, C], what the block's queries and keys are made of.
    """
    operands = Attention.of(attention)
    queries, keys, tokens = shape_of(operands.q), shape_of(operands.k), shape_of(stream)[:2]
    if operands.bias is not None:
        return "its logits have a bias or a mask besides"
    if len(queries) != 4 or queries[:2] != keys[:2] or queries[0] != tokens[0]:
        return "its queries and keys aren't [B, H, N, D] of the same images and heads"
    if queries[2] != tokens[1] or keys[2] != tokens[1]:
        return "there are other queries and keys than one for each token"
    return ""


def _between(start: fx.Node, end: fx.Node) -> tuple[fx.Node, ...]:
    """Return the nodes by which `end` is computed from `start`, which isn't one of them."""
    found = (ancestors(end) | {end}) & descendants(start)
    return tuple(node for node in start.graph.nodes if node in found)
