"""Maps of all tokens that a site had over those that it left, for a strategy that recovers tokens by attention.

    x ──┬─ norm ─ q again                              becomes, where removed tokens are read,
        └─ x' ─┬─ norm ─ q ─ attention ─ …               shares = softmax(q again · (k again)ᵀ · scale), mean over heads
               └─ norm ─ k again

What makes a block's queries is computed once more from what enters the site, and what makes its keys from what it
leaves; values aren't. The copies are made before the graph is typed, so that types repair them like everything else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from gtp_fx.analysis.blocks import AttentionBlock
from gtp_fx.analysis.own_queries import OwnQueries, own_queries
from gtp_fx.graph.verify import propagate_shapes
from gtp_fx.passes.exact.split_projections import keep_rows_read
from gtp_fx.strategies.sites import Attention
from gtp_fx.types.axes import TokenAxis
from gtp_fx.types.grids import Grid

Level = tuple[Grid, int]
"""A stream, and the number of its sites before the one that is meant."""


@dataclass(frozen=True)
class TokenMap:
    """What the map of a site is made of.

    q: queries [B, H, N, D] of the tokens that enter it. k: keys [B, H, M, D] of those that it leaves.
    scale: of the logits; None for D^-1/2.
    axis: the tokens of the stream.
    """

    q: fx.Node
    k: fx.Node
    scale: float | None
    axis: TokenAxis


def map_tokens(gm: fx.GraphModule, sites: Iterable[AttentionBlock], wanted: Collection[Level]) -> dict[Level, TokenMap]:
    """Insert what the maps of some sites are made of, in place.

    sites: the blocks at whose inputs there are sites, in graph order.
    """
    found: dict[Level, TokenMap] = {}
    passed: dict[Grid, int] = {}
    for block in sites:
        grid = block.axis.domain.grid
        level = passed[grid] = passed.get(grid, -1) + 1
        if (grid, level) in wanted:
            parts = own_queries(block)
            assert parts is not None, "the strategy refuses other blocks"
            found[grid, level] = _mapped(gm.graph, block, parts)
    propagate_shapes(gm, after=map_tokens.__name__)
    return found


def _mapped(graph: fx.Graph, block: AttentionBlock, parts: OwnQueries) -> TokenMap:
    queries = _again(graph, parts.queries, parts.own, parts.stream)
    keys = _again(graph, parts.keys, parts.stream, parts.own)
    for linear in parts.rows_for_keys:
        keep_rows_read(graph, keys[linear])
    operands = Attention.of(block.attention)
    return TokenMap(queries[operands.q], keys[operands.k], operands.scale, block.axis)


def _again(graph: fx.Graph, nodes: Sequence[fx.Node], start: fx.Node, other: fx.Node) -> dict[fx.Node, fx.Node]:
    """Copy some nodes, for which `other` is what `start` is for them; return each one's copy."""
    copies = {start: other}
    for node in nodes:
        with graph.inserting_after(node):
            copies[node] = graph.node_copy(node, lambda operand: copies.get(operand, operand))
    return copies
