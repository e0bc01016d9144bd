"""Hand-made graphs for the passes: a few lines of PyTorch, traced to ATen with shapes, as the capture leaves them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from gtp_fx.graph.primes import fix_symbols


def traced(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """The ATen graph of `function`, its nodes typed with shapes."""
    gm = make_fx(function, pre_dispatch=True, tracing_mode="fake")(*inputs)
    fix_symbols(gm)
    return gm


def node(gm: fx.GraphModule, target: Any, which: int = 0) -> fx.Node:
    """The `which`-th call of `target` in graph order."""
    return [n for n in gm.graph.nodes if n.target is target][which]


def calls(gm: fx.GraphModule, target: Any) -> int:
    return sum(n.target is target for n in gm.graph.nodes)


def patches(image: Tensor, weight: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, N, D]: how every vision transformer begins."""
    return torch.nn.functional.conv2d(image, weight, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
