"""Exact: residual streams that lie otherwise, such as [N, B, C] or [B, C, N], are turned to [B, N, C].

Maps [B, C, H, W] are turned to [B, H, W, C] where tokens can then skip a branch, which needs features last.

    x [N, B, C] ─ norm ─ …                x ─ permute ─ x [B, N, C] ─ norm ─ permute ─ …
    └──────── add [N, B, C]     ->        └──────────── add [B, N, C]

A stream is turned once, before its first block. From there on what follows is done in the new layout, operator by
operator, and turned back only for an operator that can't be (a view that merges tokens with images, a convolution over
neighbours); what such an operator makes of a map is turned again. So later passes know one layout.
Convolutions with a kernel of one become linear layers. An add of the stream and a branch turns the branch's result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import fx

from gtp_fx.analysis.marks import MARK, marks_of
from gtp_fx.analysis.residual_adds import share_in
from gtp_fx.analysis.token_states import state_before
from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.capture.layers import stays_whole
from gtp_fx.graph import edit
from gtp_fx.graph.nodes import ancestors, descendants
from gtp_fx.graph.symbols import shape_of
from gtp_fx.graph.verify import propagate_shapes
from gtp_fx.passes.exact.turned_layout import Order, Walk, changes
from gtp_fx.passes.exact.turned_operators import rule_of
from gtp_fx.types.axes import Plain, TensorType, holds_images, is_plain
from gtp_fx.types.grids import Grid, GridAxis
from gtp_fx.types.infer import WholeTyping
from gtp_fx.types.merging import split_tokens

_RANK = 3
"""Dimensions of a stream whose tokens are a row."""


def turn_streams(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of `gm`, whose blocks are marked, with residual streams [B, N, C]; `gm` itself where all are."""
    orders = _streams(gm.graph)
    rows = {stream: order for stream, order in orders.items() if len(order) == _RANK}
    if len(rows) < len(orders):
        turned = _turned(gm, orders)
        propagate_shapes(turned, after=turn_streams.__name__)
        if _blocks_losing_tokens(turned) > _blocks_losing_tokens(gm):
            return turned
    return _turned(gm, rows) if rows else gm


def _blocks_losing_tokens(gm: fx.GraphModule) -> int:
    """Return at how many blocks tokens can be removed or skip a branch."""
    return sum(block.refusal is None or block.branch is not None for block in typed_graph(gm.graph).blocks)


def _turned(gm: fx.GraphModule, orders: Mapping[fx.Node, Order]) -> fx.GraphModule:
    """Return a copy of `gm` with these streams turned. orders: what turns each."""
    typing = typed_graph(gm.graph).whole
    gm, copies = edit.copy_with_nodes(gm)
    shapes = {node: shape_of(node) for node in gm.graph.nodes if _is_tensor(node)}
    walk = Walk(gm.graph, shapes, rule_of, lambda node: stays_whole(gm, node))
    starts = {copies[node]: order for node, order in orders.items()}
    again = {copies[node]: order for node, order in _maps(typing, orders).items()}
    for node in list(gm.graph.nodes):
        reads_turned = any(operand in walk.turned for operand in node.all_input_nodes)
        walk.turn(node)
        if node not in walk.turned and (order := starts.get(node) or (again.get(node) if reads_turned else None)):
            walk.begin(node, order)
    return edit.finish(gm)


def _maps(typing: WholeTyping, streams: Iterable[fx.Node]) -> dict[fx.Node, Order]:
    """Return the maps over the grids of some streams, and what turns each.

    What follows a convolution over neighbours in a branch works token by token again.
    """
    grids = {grid for stream in streams for grid in _grids(typing.type(stream))}
    found = [node for node in typing.graph.nodes if typing.is_tensor(node) and len(typing.type(node)) > _RANK]
    orders = {node: _to_turn(typing.type(node)) for node in found if _grids(typing.type(node)) & grids}
    return {node: order for node, order in orders.items() if order is not None}


def _grids(kind: TensorType) -> set[Grid]:
    """Return the grids whose sides a type has."""
    return {factor.grid for dim in kind for factor in split_tokens(dim) if isinstance(factor, GridAxis)}


def _streams(graph: fx.Graph) -> dict[fx.Node, Order]:
    """Return the streams at which tokens could be removed but for their layout, and what turns each to [B, N, C]."""
    typing = typed_graph(graph).whole
    marked = {(mark.role, mark.index): node for node, mark in marks_of(graph)}
    found: dict[fx.Node, Order] = {}
    for (role, index), site in marked.items():
        if role != "site":
            continue
        # A stream may be turned for the sum alone; then its share in that is where the other layout begins.
        attention = marked["attention", index]
        share = share_in(site, attention, typing)
        values: list[fx.Node | None] = [] if share is None else [share.stream, share.summand]
        if share is None and _to_turn(typing.type(site)):  # a state of the tokens
            beside = ancestors(site) - ancestors(attention) - descendants(attention) - {attention}
            state = state_before(attention, site, attention.meta[MARK].axis, typing)
            values = [state, *filter(typing.is_tensor, beside)]
        for value in values:
            if value is not None and (order := _to_turn(typing.type(value))):
                found[value] = order
    return found


def _to_turn(stream: TensorType) -> Order | None:
    """Return the order that makes a stream [B, N, C] or [B, *sides, C]; None where it is so, or no order does.

    Windows may be a dimension, or merged with the images that they are of.
    """
    others = [d for d, dim in enumerate(stream) if is_plain(dim) or holds_images(dim)]
    tokens = [d for d in range(len(stream)) if d not in others]
    if len(others) != 2 or not tokens or any(isinstance(f, Plain) for d in tokens for f in stream[d]):
        return None
    images = [d for d in others if holds_images(stream[d])] or others[:1]
    features = [d for d in others if d not in images]
    order = (*images, *tokens, *features)
    return None if len(images) != 1 or not changes(order) else order


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)
