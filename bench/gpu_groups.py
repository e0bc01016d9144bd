"""Groups of GTP's operators in a graph, marked before they are lowered, and a graph without them for comparison.

A mark is in a node's meta["custom"], which is copied to whatever the node is lowered to or traced into. `bare` is a
graph with the same number of tokens everywhere, but with stock attention and no propagation, which keeps the first
tokens. It costs what the shorter stream alone would. The difference between the two graphs is the cost of GTP's
operators, by mark.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from enum import Enum
from typing import Any

from torch import fx
from torch.ops import aten, gtp_fx  # type: ignore[import-not-found]

from bench.launches import GENERATED, MARK, Launch
from gtp_fx.graph import edit, nodes
from gtp_fx.graph.symbols import shape_of


class Group(str, Enum):
    """Row of the table. Unmarked launches are `other`; they differ between graphs by how they are fused."""

    graph = "token graph"
    scored = "scored attention, over stock"
    over_heads = "scores over heads"
    told = "attention told scales, over stock"
    select = "select"
    stream = "residual + propagate + norm, over add + norm"
    single = "products of one row an image (last q)"
    other = "other"

    @classmethod
    def of(cls, launch: Launch) -> Group:
        """Return the group of a launch, by its mark."""
        if launch.mark == _SCORES:
            return cls.over_heads if launch.kind == GENERATED else cls.scored
        return cls[launch.mark] if launch.mark else cls.other


_SCORES = "scores"
"""Mark of GTP's kernels that compute scores, and of the code that Inductor generates for the reduction over heads."""


def mark(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of an optimised graph whose nodes are marked with their group.

    Call it before the graph is lowered, since marks are kept in lowering, and again afterwards, to mark operators that
    only the lowering introduces.
    """
    gm = edit.copy_of(gm)
    for node in gm.graph.nodes:
        if node.target is gtp_fx.token_graph.default:
            _put(node, Group.graph)
        elif node.target is gtp_fx.select.default:
            _put(node, Group.select)
        elif node.target is gtp_fx.attention_with_scores.default:
            _put(node, Group.scored)
        elif nodes.operator_name(node) in _TELLING:
            _put(node, Group.told)
        elif node.target is aten.scaled_dot_product_attention.default:
            if _is_told(node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")):
                _put(node, Group.told)
        elif getattr(node.target, "namespace", "") == "gtp_fx_kernels" and _mark_of(node) == Group.scored.name:
            node.meta["custom"] = {**node.meta["custom"], MARK: _SCORES}
        elif node.target in (gtp_fx.propagate.default, gtp_fx.propagation_weights.default, aten.layer_norm.default):
            # Mark all norms, because the graphs differ in where a site's sum is written and where it is recomputed.
            _put(node, Group.stream)
            if node.args[0].target is aten.add.Tensor:
                _put(node.args[0], Group.stream)
        elif _is_of_single_rows(node):
            _put(node, Group.single)
    return gm


_TELLING = ("gtp_fx.key_bias.default", "gtp_fx.scale_channels.default")
"""Operators that put token scales into attention's operands. Given by name, since not every version has all."""


def _put(node: fx.Node, group: Group) -> None:
    node.meta["custom"] = {**(node.meta.get("custom") or {}), MARK: group.name}


def _is_told(bias: Any) -> bool:
    return isinstance(bias, fx.Node) and bias.target is gtp_fx.key_bias.default


def _mark_of(node: fx.Node) -> Any:
    return (node.meta.get("custom") or {}).get(MARK)


def _is_of_single_rows(node: fx.Node) -> bool:
    return node.target is aten.linear.default and len(shape_of(node)) == 3 and shape_of(node)[1] == 1


def bare(marked: fx.GraphModule) -> fx.GraphModule:
    """Return a marked graph without GTP's operators, with the same token counts. Remaining nodes keep their marks.

    Raises NotImplementedError where an operator has no stock equivalent, such as one that restores tokens.
    """
    gm = edit.copy_of(marked)
    for node in list(gm.graph.nodes):
        replace = _WITHOUT.get(node.target)
        if replace is not None:
            with gm.graph.inserting_before(node):
                replace(gm.graph, node)
    gm = edit.finish(gm)
    for node in gm.graph.nodes:
        if getattr(node.target, "namespace", "") == "gtp_fx":
            raise NotImplementedError(f"{node.format_node()}: nothing stock stands for this operator")
    return gm


def _stock_attention(graph: fx.Graph, node: fx.Node) -> None:
    q, k, v, bias, scale, *_ = node.args
    stock = edit.call(graph, aten.scaled_dot_product_attention.default, q, k, v, _untold(bias), like=node)
    stock.kwargs = {"scale": scale}
    for user in list(node.users):
        if user.target is operator.getitem and user.args[1] == 0:
            user.replace_all_uses_with(stock)


def _attention_untold(graph: fx.Graph, node: fx.Node) -> None:
    bias = node.args[3] if len(node.args) > 3 else None
    if _is_told(bias):
        node.args = (*node.args[:3], _untold(bias), *node.args[4:])


def _untold(bias: Any) -> Any:
    return bias.args[3] if _is_told(bias) else bias


def _first_rows(graph: fx.Graph, node: fx.Node) -> None:
    """Replace propagation by a slice of as many tokens. Which tokens are kept doesn't matter, only the sizes do."""
    x: Any = node.args[0]
    shorter = edit.call(graph, aten.slice.Tensor, x, 1, 0, shape_of(node)[1], like=node)
    shorter.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(shorter)


def _rows_together(graph: fx.Graph, node: fx.Node) -> None:
    """Replace a product over [B, 1, C] by one over [B, C], which reads the weight once instead of once per image."""
    if not _is_of_single_rows(node):
        return
    x, *held = node.args
    flat = edit.call(graph, aten.select.int, x, 1, 0, like=node)
    made = edit.call(graph, aten.linear.default, flat, *held, like=node)
    whole = edit.call(graph, aten.unsqueeze.default, made, 1, like=node)
    whole.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(whole)


_WITHOUT: dict[Any, Callable[[fx.Graph, fx.Node], None]] = {
    gtp_fx.attention_with_scores.default: _stock_attention,
    aten.scaled_dot_product_attention.default: _attention_untold,
    gtp_fx.propagate.default: _first_rows,
    aten.linear.default: _rows_together,
}
