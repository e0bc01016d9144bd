"""FLOPs of one graph as it stands, per image."""

from __future__ import annotations

import torch
from torch import fx

from gtp_fx.graph.nodes import tensors_of
from gtp_fx.graph.symbols import at_batch
from gtp_fx.ops.register import flops_of
from gtp_fx.plan.cost.formulas import Sizes, find


def count_flops(graph: fx.Graph, batch: int = 1) -> int:
    """Return the FLOPs of `graph`, whose nodes carry `meta["val"]`, with `batch` images in each symbolic batch."""
    return sum(node_flops(node, batch) for node in graph.nodes if node.op == "call_function")


def node_flops(node: fx.Node, batch: int = 1) -> int:
    """Return the FLOPs of one node, with `batch` images in each symbolic batch."""
    formula = find(node.target)
    if formula is None:
        return _run(node, batch)
    operands = {n: _sizes(n, batch) for n in node.all_input_nodes if tensors_of(n.meta.get("val"))}
    return int(formula(Sizes(node, operands, _sizes(node, batch))))


def _run(node: fx.Node, batch: int) -> int:
    """Count an operator without a formula by running it on meta tensors and counting what it calls.

    Returns 0 where it isn't one of this package's operators, whose inside can be counted.
    """
    counted = flops_of(node.target)
    if counted is None:
        return 0

    def alone(operand: fx.Node) -> torch.Tensor:
        return torch.empty(_sizes(operand, batch), dtype=tensors_of(operand.meta["val"])[0].dtype, device="meta")

    args, kwargs = fx.map_arg((node.args, node.kwargs), alone)  # type: ignore[misc]
    return counted(*args, **kwargs)


def _sizes(node: fx.Node, batch: int) -> tuple[int, ...]:
    return tuple(at_batch(size, batch) for size in tensors_of(node.meta["val"])[0].shape)
