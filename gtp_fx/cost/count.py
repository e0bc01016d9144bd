"""FLOPs of a graph as it stands, per image."""

from __future__ import annotations

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

from gtp_fx.cost.formulas import Sizes, find
from gtp_fx.graphs import tensors_of
from gtp_fx.ops.register import opaque_operators
from gtp_fx.sizes import per_image


def count_flops(graph: fx.Graph) -> int:
    """FLOPs of one image through `graph`, whose nodes carry `meta["val"]`. A symbolic batch counts as 1."""
    return sum(node_flops(node) for node in graph.nodes if node.op == "call_function")


def node_flops(node: fx.Node) -> int:
    """FLOPs of one node for one image."""
    formula = find(node.target)
    if formula is None:
        return _counted(node) if node.target in opaque_operators() else 0
    operands = {n: _sizes(n) for n in node.all_input_nodes if tensors_of(n.meta.get("val"))}
    return int(formula(Sizes(node, operands, _sizes(node))))


def _counted(node: fx.Node) -> int:
    """Of an operator that somebody else has written: its inside, run without numbers."""

    def alone(operand: fx.Node) -> torch.Tensor:
        return torch.empty(_sizes(operand), dtype=tensors_of(operand.meta["val"])[0].dtype, device="meta")

    args = fx.map_arg(node.args, alone)
    with FlopCounterMode(display=False) as counter:
        node.target(*args)  # type: ignore[operator]
    return int(counter.get_total_flops())


def _sizes(node: fx.Node) -> tuple[int, ...]:
    return tuple(map(per_image, tensors_of(node.meta["val"])[0].shape))
