"""Exact: linear layers become calls of `torch.nn.functional.linear`, for graphs that a module runs.

A weight may be replaced by a tensor of another class, a quantised one. Such classes override
`torch.nn.functional.linear`. They never see aten.linear, which autograd decomposes first. Few of them can be
concatenated: where `fuse_projections` concatenates weights, that is decided when the graph runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch.nn import Parameter
from torch.nn import functional as F
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph import edit


def functional_linear(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of `gm` with functional linear layers, which is to be run and not rewritten further."""
    return call_functional_linear(edit.copy_of(gm))


def call_functional_linear(gm: fx.GraphModule) -> fx.GraphModule:
    """Do the same in place, where another pass has just made the graph."""
    for node in gm.graph.nodes:
        if node.target is aten.linear.default:
            weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
            node.target = F.linear
            if _joined(weight) and (bias is None or _joined(bias)):
                node.target = joined_linear
                node.args = (node.args[0], weight.args[0], None if bias is None else bias.args[0])
    return edit.finish(gm)


def joined_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None) -> Tensor:
    """Apply several linear layers to one input; return their outputs side by side, [..., sum of widths].

    That is one product, unless a weight has a class other than Tensor and Parameter.
    """
    if all(type(weight) in (Tensor, Parameter) for weight in weights):
        return F.linear(x, torch.cat(list(weights)), None if biases is None else torch.cat(list(biases)))
    each = [None] * len(weights) if biases is None else biases
    return torch.cat([F.linear(x, weight, bias) for weight, bias in zip(weights, each, strict=True)], dim=-1)


def _joined(value: object) -> bool:
    """Tell whether a value is a concatenation along the first dimension, as `fuse_projections` inserts."""
    return isinstance(value, fx.Node) and value.target is aten.cat.default and len(value.args) == 1
