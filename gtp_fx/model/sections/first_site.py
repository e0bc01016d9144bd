"""The first site becomes like the others: its attention is told token scales, too, which are all 1.

    attention_with_scores(q, k, v, None, …)   ->   attention_with_scores(q, k, v, key_bias(ones, …), …)

Their logarithms are 0, so no number changes, and the block shares the code of those after it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.ops import gtp_fx  # type: ignore[import-not-found]

from gtp_fx.graph.torch_internals import mode_of
from gtp_fx.model.sections.cut import OUTSIDE
from gtp_fx.model.sections.values import value_of

_SCORES = gtp_fx.attention_with_scores.default


def like_the_others(graph: fx.Graph) -> None:
    """Give scales of 1 to attention that scores tokens and knows none, where others of its form know some; in place."""
    calls = graph.find_nodes(op="call_function", target=_SCORES)
    told = {_form(node): _told(node) for node in calls if _told(node) is not None}
    for node in calls:
        template = told.get(_form(node))
        if template is not None and node.args[3] is None:
            _tell(graph, node, template)


def _form(node: fx.Node) -> Any:
    """Return what calls have in common that may share code: their options, heads and features."""
    query = value_of(node.args[0])  # type: ignore[arg-type]
    return str((node.args[4:], node.kwargs, query.shape[1], query.shape[3], query.dtype))


def _told(node: fx.Node) -> fx.Node | None:
    """Return the bias of token scales that a call has, where it has no other."""
    bias = node.args[3]
    is_told = isinstance(bias, fx.Node) and bias.target is gtp_fx.key_bias.default and bias.args[3] is None
    return bias if is_told else None  # type: ignore[return-value]


def _tell(graph: fx.Graph, node: fx.Node, template: fx.Node) -> None:
    q, k = node.args[0], node.args[1]
    prefix, suffix = template.args[1:3]
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node)
    images, tokens = _written(graph, value_of(k).shape[0]), _written(graph, value_of(k).shape[2] - prefix - suffix)
    if images is None or tokens is None:
        return
    first = next(node for node in graph.nodes if node.op not in OUTSIDE)
    like = value_of(template.args[0])  # type: ignore[arg-type]
    options = {"dtype": like.dtype, "device": like.device}
    with graph.inserting_before(first):
        ones = graph.call_function(torch.ones, (images, tokens), options)
    with graph.inserting_before(node):
        bias = graph.call_function(template.target, (ones, prefix, suffix, None, q))  # type: ignore[arg-type]
    with mode_of(value_of(q)), torch.no_grad():
        ones.meta["val"] = torch.ones(value_of(k).shape[0], value_of(k).shape[2] - prefix - suffix, **options)
        bias.meta["val"] = template.target(ones.meta["val"], prefix, suffix, None, value_of(q))  # type: ignore[operator]
    node.update_arg(3, bias)


def _written(graph: fx.Graph, size: Any) -> Any:
    """Return a size as an argument: a number, or the input that it is; None where it is neither."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    found = (
        node
        for node in graph.find_nodes(op="placeholder")
        if isinstance(value_of(node), torch.SymInt) and value_of(node).node.expr == size.node.expr
    )
    return next(found, None)
