"""Exact: states of tokens in any layout become one stream, [B, N, features], where tokens may be removed.

    state [B, N, S, C] ─ …      ->      state ─ view [B, N, S·C] ─ view [B, N, S, C] ─ …
    state [S, B, N, C] ─ …      ->      state ─ permute, view [B, N, S·C] ─ view, permute [S, B, N, C] ─ …
    state [B·N, C] ─ …          ->      state ─ view [B, N, C] ─ view [B·N, C] ─ …

The joined value is the block's site from then on: what removes tokens and passes them on knows one layout. Streams that
are turned as a whole, [N, B, C], have become [B, N, C] before (`turn_streams`).
"""

from __future__ import annotations

import math

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.analysis.marks import MARK
from gtp_fx.analysis.token_states import factors_of, has_rows, holds_others, row_order
from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.graph import edit
from gtp_fx.graph.symbols import shape_of, written
from gtp_fx.types.axes import TensorType, TokenAxis, token_axis

_RANK = 3


def join_streams(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of `gm`, whose blocks are marked, with such streams joined; `gm` itself where there are none."""
    typed = typed_graph(gm.graph)
    whole, blocks = typed.whole, typed.blocks
    kinds: dict[fx.Node, TensorType] = {}
    orders: dict[fx.Node, list[int]] = {}
    for block in blocks:
        attending = whole.type(block.attention)[0]
        for node in filter(None, (block.stream, block.site)):
            kinds[node] = kind = whole.type(node)
            # What is merged with images, and stays so in attention, is as many images; else it is streams of each.
            each_attends = holds_others(attending) and kind[0] == attending
            if not each_attends and (order := _order(kind, block.axis)) is not None:
                orders[node] = order
    if not orders:
        return gm
    gm, copies = edit.copy_with_nodes(gm)
    for original, order in orders.items():
        _join(gm.graph, copies[original], kinds[original], order)
    return edit.finish(gm)


def _order(kind: TensorType, axis: TokenAxis) -> list[int] | None:
    """Return the order of a type's factors in which they are a stream's; None where the type is one, or can't be."""
    factors = factors_of(kind)
    if has_rows(kind, axis):
        return None if len(kind) == _RANK else list(range(len(factors)))
    # Streams beside each other, or dimensions that are merged; a stream that is only turned isn't joined.
    return row_order(kind, axis) if len(factors) > _RANK or any(len(dim) > 1 for dim in kind) else None


def _join(graph: fx.Graph, node: fx.Node, kind: TensorType, order: list[int]) -> None:
    """Insert the stream [B, N, features] that a state is, and give what it was to every reader."""
    emit = edit.Emitter(graph, like=node, before=node.next)
    shape, row = list(shape_of(node)), list(range(len(order)))
    if token_axis(kind[1]) is not None and order == row:  # one view, no step between
        joined = emit(aten.reshape.default, node, written([*shape[:2], math.prod(shape[2:])]))
        again = emit(aten.reshape.default, joined, written(shape))
    else:
        apart = [factor.whole_size for factor in factors_of(kind)]
        ordered = [apart[place] for place in order]
        stream = [*ordered[:2], math.prod(ordered[2:])]

        def seen(value: fx.Node, own: list[int], wanted: list[int]) -> fx.Node:
            return value if own == wanted else emit(aten.reshape.default, value, written(wanted))

        def permuted(value: fx.Node, by: list[int]) -> fx.Node:
            return value if by == row else emit(aten.permute.default, value, by)

        joined = seen(permuted(seen(node, shape, apart), order), ordered, stream)
        again = permuted(seen(joined, stream, ordered), [order.index(place) for place in row])
        again = seen(again, apart, shape)
    for user in [user for user in node.users if user not in emit.inserted]:
        user.replace_input_with(node, again)
    if MARK in node.meta:
        joined.meta[MARK] = node.meta.pop(MARK)
