"""Exact: an attention's mask or bias gets as many dimensions as its queries.

    sdpa(q [B, H, N, D], …, bias [H, N, N])        becomes        sdpa(q, …, bias [1, H, N, N])

torch broadcasts either way, but on a CPU its fused attention takes a mask of two or four dimensions alone. With three
it computes the whole map, without a word.
"""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph import edit
from gtp_fx.graph.symbols import shape_of
from gtp_fx.strategies.sites import Attention

_TAKEN = 2
"""Dimensions of a mask that are as good as all: one for all images and heads."""


def align_masks(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of `gm` in which masks have two dimensions or as many as the queries; `gm` itself where all do."""
    if not any(_is_short(node) for node in gm.graph.nodes):
        return gm
    gm = edit.copy_of(gm)
    for node in [node for node in gm.graph.nodes if _is_short(node)]:
        attention, emit = Attention.of(node), edit.Emitter(gm.graph, like=node, before=node)
        mask: Any = attention.bias
        for _ in range(len(shape_of(attention.q)) - len(shape_of(mask))):
            mask = emit(aten.unsqueeze.default, mask, 0)
        edit.set_args(node, (*node.args[:3], mask, *node.args[4:]))
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != "attn_mask"}
    return edit.finish(gm)


def _is_short(node: fx.Node) -> bool:
    """Return whether a node is attention whose mask has more than two dimensions, and fewer than its queries."""
    if node.target is not aten.scaled_dot_product_attention.default:
        return False
    attention = Attention.of(node)
    return attention.bias is not None and _TAKEN < len(shape_of(attention.bias)) < len(shape_of(attention.q))
