"""Values that sections pass on lie in memory in the order of their dimensions, features last.

    x = convolution(images).permute(0, 2, 3, 1)         features are far apart in memory
    y = x + positions; z = y + attention(norm(y))       and stay so: a sum has its first operand's strides

Compiled whole, Inductor would choose how y and z lie. Between sections strides are those of a run as written, so every
kernel on such a stream would gather its features one by one. Copied once, before its first sum, it is like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph.nodes import descendants
from gtp_fx.graph.torch_internals import fill_values, is_operator
from gtp_fx.model.sections.cut import OUTSIDE
from gtp_fx.model.sections.values import lies_in_order, value_of

_ROUNDS = 3
"""How often values are computed anew. Streams that come out of order more often are left as they are, and are right."""


def in_order(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Copy values that would put sums out of order, and compute all values anew, in place."""
    for _ in range(_ROUNDS):
        mixed = [node for node in gm.graph.nodes if _out_of_order(node)]
        if not mixed:
            return
        # What follows the first one is out of order because of it.
        followers = descendants(mixed[0])
        for node in mixed:
            if node in followers and node is not mixed[0]:
                continue
            for operand in _out_of_order(node):
                _copied(gm.graph, operand)
        fill_values(gm, inputs)


def _copied(graph: fx.Graph, value: fx.Node) -> None:
    """Let a contiguous copy be read wherever a value is."""
    after = value if value.op not in OUTSIDE else next(n for n in graph.nodes if n.op not in OUTSIDE).prev
    with graph.inserting_after(after):
        copy = graph.call_function(aten.contiguous.default, (value,))
    value.replace_all_uses_with(copy, delete_user_cb=lambda user: user is not copy)


def _out_of_order(node: fx.Node) -> list[fx.Node]:
    """Return the operands of an element-wise operator that keep its result from being in order as another one is."""
    value = value_of(node)
    if not _has_rows(value) or lies_in_order(value):
        return []
    if not is_operator(node.target) or torch.Tag.pointwise not in node.target.tags:
        return []
    # The batch's size may be 1, as that of positions is.
    summed = [n for n in node.all_input_nodes if _has_rows(value_of(n)) and value_of(n).shape[1:] == value.shape[1:]]
    apart = [n for n in summed if not lies_in_order(value_of(n))]
    return apart if len(apart) < len(summed) else []


def _has_rows(value: Any) -> bool:
    """Return whether a value may be a stream, [B, N, C] or [B, H, W, C]."""
    return isinstance(value, Tensor) and value.layout is torch.strided and value.dim() > 2
