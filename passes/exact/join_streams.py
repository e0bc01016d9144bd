"""Exact: streams that lie side by side, [B, N, S, C], become one of S * C features where tokens may be removed.

    state [B, N, S, C] ─ …      ->      state ─ view [B, N, S·C] ─ view [B, N, S, C] ─ …

The first view is the block's site from then on: what removes tokens and passes them on knows one layout.
"""

from __future__ import annotations

import math

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.analysis.marks import MARK
from gtp_fx.analysis.token_states import has_rows
from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.graph import edit
from gtp_fx.graph.symbols import shape_of, written


def join_streams(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of `gm`, whose blocks are marked, with such streams joined; `gm` itself where there are none."""
    typed = typed_graph(gm.graph)
    read = {node: block.axis for block in typed.blocks for node in (block.stream, block.site) if node is not None}
    several = [
        node for node, axis in read.items() if len(shape_of(node)) > 3 and has_rows(typed.whole.type(node), axis)
    ]
    if not several:
        return gm
    gm, copies = edit.copy_with_nodes(gm)
    for original in several:
        node = copies[original]
        emit = edit.Emitter(gm.graph, like=node, before=node.next)
        shape = shape_of(node)
        joined = emit(aten.reshape.default, node, written([*shape[:2], math.prod(shape[2:])]))
        apart = emit(aten.reshape.default, joined, written(shape))
        for user in [user for user in node.users if user is not joined]:
            user.replace_input_with(node, apart)
        if MARK in node.meta:
            joined.meta[MARK] = node.meta.pop(MARK)
    return edit.finish(gm)
