"""Exact: for a strategy that shortens queries alone, a block's keys and values are computed apart from its queries.

    x ──┬─ norm ─ q, k, v ─ attention ─ … ─ add           x ──┬─ norm ─ k, v ────┐
        └────────────────────────────────────┘    becomes     └─ x' ─┬─ norm ─ q ─ attention ─ … ─ add
                                                                     └──────────────────────────────┘

x' is x under a name of its own, after which a site can stand: what it leaves then attends to all of x. Projections that
made queries, keys and values at once are split by rows of their weights, so that no product is computed twice. The norm
before them is computed for both, and a hook on it sees both. Blocks where a product would be computed twice stay as
they are.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.analysis.blocks import AttentionBlock
from gtp_fx.analysis.fused_projections import match_fused
from gtp_fx.analysis.own_queries import why_no_map
from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.capture.layers import stays_whole
from gtp_fx.graph import edit
from gtp_fx.graph.nodes import ancestors, descendants
from gtp_fx.graph.operators import ATTENTION
from gtp_fx.passes.exact.split_projections import keep_rows_read
from gtp_fx.plan.cost.formulas import formula_of
from gtp_fx.strategies.sites import NO_MAP, OWN_QUERIES, Attention


@dataclass(frozen=True)
class Apart:
    """What is taken apart in a block.

    stream: the block's input. attention: its attention.
    inside: the nodes between them and up to the block's residual add, with both ends of that.
    keys: those of them that keys and values are computed by, in graph order.
    joint: the projections among these that make queries as well.
    """

    stream: fx.Node
    attention: fx.Node
    inside: frozenset[fx.Node]
    keys: tuple[fx.Node, ...]
    joint: tuple[fx.Node, ...]


def keys_apart(gm: fx.GraphModule, shortens_queries: bool = False) -> fx.GraphModule:
    """Return a copy of `gm`, whose blocks are marked, in which keys and values don't read what queries read.

    `gm` itself where no strategy asks for it, or no block lets it.

    shortens_queries: the strategy does.
    """
    if not shortens_queries:
        return gm
    found = [apart for block in typed_graph(gm.graph).blocks if (apart := _read(gm, block)) is not None]
    if not found:
        return gm
    gm, copies = edit.copy_with_nodes(gm)
    joint = [linear for apart in found for linear in _take_apart(gm.graph, apart, copies)]
    edit.finish(gm)  # which removes the readers that no longer count
    for linear in joint:
        keep_rows_read(gm.graph, linear)
    return edit.finish(gm)


def _read(gm: fx.GraphModule, block: AttentionBlock) -> Apart | None:
    """Return what can be taken apart in a block; None where nothing can, or something would be multiplied twice."""
    if block.refusal is not None or block.stream is None or block.site is None:
        return None
    if block.attention.target not in ATTENTION:
        return None
    operands = Attention.of(block.attention)
    of_stream = descendants(block.stream)
    if operands.bias in of_stream or not {operands.k, operands.v} <= of_stream:
        return None
    by_keys = (ancestors(operands.k) | ancestors(operands.v) | {operands.k, operands.v}) & of_stream
    by_queries = (ancestors(operands.q) | {operands.q}) & of_stream
    keys = tuple(node for node in gm.graph.nodes if node in by_keys)
    multiplied = [node for node in keys if node in by_queries and formula_of(node) is not None]
    if not all(_comes_apart(gm, node, by_keys, by_queries) for node in multiplied):
        return None
    inside = frozenset((ancestors(block.site) | {block.site}) & of_stream)
    return Apart(block.stream, block.attention, inside, keys, tuple(multiplied))


def _comes_apart(gm: fx.GraphModule, node: fx.Node, by_keys: set[fx.Node], by_queries: set[fx.Node]) -> bool:
    """Return whether a product for keys and queries is a projection that can be split, no row of which is for both."""
    fused = match_fused(node)
    if fused is None or stays_whole(gm, node):
        return False
    return not any(part.node in by_keys and part.node in by_queries for part in fused.parts)


def _take_apart(graph: fx.Graph, apart: Apart, copies: dict[fx.Node, fx.Node]) -> list[fx.Node]:
    """Let the copy of a block read its input under a name of its own, but for what makes keys and values.

    Returns the joint projections, each for the queries and for the others.
    """
    stream, attention = copies[apart.stream], copies[apart.attention]
    with graph.inserting_after(stream):
        own = edit.call(graph, aten.alias.default, stream, like=stream)
    own.meta |= {"val": stream.meta["val"], OWN_QUERIES: True, NO_MAP: why_no_map(attention, stream)}
    inside = {copies[node] for node in apart.inside}
    stream.replace_all_uses_with(own, delete_user_cb=lambda user: user in inside)
    again = {own: stream}
    for node in map(copies.__getitem__, apart.keys):
        with graph.inserting_after(node):
            again[node] = graph.node_copy(node, lambda operand: again.get(operand, operand))
    q, k, v, *rest = attention.args
    attention.args = (q, again[k], again[v], *rest)  # type: ignore[index]
    joint = [copies[node] for node in apart.joint]
    return [*joint, *(again[node] for node in joint)]
