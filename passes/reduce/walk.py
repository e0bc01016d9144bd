"""What `remove_tokens` knows on its way through a graph: streams, attention, and what was replaced so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from gtp_fx.analysis.attention_maps import AttentionMap
from gtp_fx.analysis.blocks import AttentionBlock
from gtp_fx.graph import edit
from gtp_fx.passes.reduce.map_tokens import TokenMap
from gtp_fx.plan.plan import Plan
from gtp_fx.strategies.sites import Attention, StreamState
from gtp_fx.types.axes import TensorType
from gtp_fx.types.grids import Grid
from gtp_fx.types.infer import SiteTyping


@dataclass
class Walk:
    """State of one walk.

    graph: the graph that is rewritten.
    plan: the plan.
    typing: types with the plan's sites.
    blocks: blocks by their attention.
    weighing: maps of attention that is spelled out, by their softmax, or by their product with values.
    args: each node's arguments before the walk, which the types refer to.
    states: the strategy's states of each stream, by level.
    places: each stream's places, where its tokens aren't in the grid's order.
    attention: each block's attention, by the block's number.
    scores: the scores of each block that has some, by the block's number.
    replacement: nodes that have been replaced, and by what.
    shares: the weights that recover each site's removed tokens, by stream and the level before the site.
    coerced: coerced values, by operand and what was done to it.
    stream_at_site: each stream as it entered a site, by stream and the level before the site.
    maps: what the map of tokens over those left is made of, by stream and the level before the site; none for a
        strategy that recovers tokens otherwise.
    """

    graph: fx.Graph
    plan: Plan
    typing: SiteTyping
    blocks: dict[fx.Node, AttentionBlock]
    weighing: dict[fx.Node, AttentionMap]
    args: dict[fx.Node, Any]
    states: dict[Grid, list[StreamState]] = field(default_factory=dict)
    places: dict[Grid, fx.Node | None] = field(default_factory=dict)
    attention: dict[int, Attention] = field(default_factory=dict)
    scores: dict[int, fx.Node] = field(default_factory=dict)
    replacement: dict[fx.Node, fx.Node] = field(default_factory=dict)
    shares: dict[tuple[Grid, int], fx.Node] = field(default_factory=dict)
    coerced: dict[Any, fx.Node] = field(default_factory=dict)
    stream_at_site: dict[tuple[Grid, int], fx.Node] = field(default_factory=dict)
    maps: Mapping[tuple[Grid, int], TokenMap] = field(default_factory=dict)

    def wanted(self, node: fx.Node, position: int) -> TensorType:
        """Return the type in which `node` needs the operand that it had at `position` before the walk."""
        return self.typing.results[node].operands[self.args[node][position]]

    def current(self, node: Any) -> fx.Node:
        """Return the node's replacement, or the node itself."""
        found: fx.Node = self.replacement.get(node, node)
        return found

    def node_named(self, name: str) -> fx.Node:
        """Return a node that types name."""
        named: fx.Node = next(node for node in self.graph.nodes if node.name == name)
        return named

    def replace(self, old: fx.Node, new: fx.Node, emit: edit.Emitter) -> None:
        """Give `new` to all readers of `old` but the nodes that `emit` has inserted."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in emit.inserted)
        self.replacement[old] = new
