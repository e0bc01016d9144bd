"""FLOPs of one graph as it stands, per image, and what of it has none that are known."""

from __future__ import annotations

import torch
from torch import fx

from gtp_fx.errors import Refusal
from gtp_fx.graph.nodes import refusal, tensors_of
from gtp_fx.graph.symbols import at_batch, depends_on_data, is_symbolic
from gtp_fx.ops.register import flops_of
from gtp_fx.plan.cost.formulas import Sizes, by_running, formula_of
from gtp_fx.plan.cost.opened import opened


def count_flops(graph: fx.Graph, batch: int = 1) -> int:
    """Return the FLOPs of `graph`, whose nodes carry `meta["val"]`, with `batch` images in each symbolic batch."""
    return sum(node_flops(node, batch) for node in graph.nodes if node.op == "call_function")


def node_flops(node: fx.Node, batch: int = 1) -> int:
    """Return the FLOPs of one node, with `batch` images in each symbolic batch."""
    formula = formula_of(node)
    if formula is None:
        return _run(node, batch)
    if formula is by_running:
        return opened(node, batch=batch).flops
    operands = {n: _sizes(n, batch) for n in node.all_input_nodes if tensors_of(n.meta.get("val"))}
    return int(formula(Sizes(node, operands, _sizes(node, batch))))


def uncounted(graph: fx.Graph) -> tuple[Refusal, ...]:
    """Return the operators that multiply matrices, or may, and whose FLOPs aren't known: each reason once."""
    found: dict[str, Refusal] = {}
    given = {size for node in graph.find_nodes(op="placeholder") for size in _symbols(node)}
    for node in graph.nodes:
        reason = opened(node).uncounted
        read = {size for operand in (node, *node.all_input_nodes) for size in _symbols(operand)} - given
        if not reason and any(map(depends_on_data, read)) and node.op == "call_function" and node_flops(node):
            reason = "how many it multiplies depends on what tensors hold (experts for some tokens, a nonzero)"
        if reason:
            found.setdefault(reason, refusal(node, f"{reason}, so it isn't counted"))
    return tuple(found.values())


def _symbols(node: fx.Node) -> set[int]:
    """Return the sizes of a node's value that are known only when the graph runs."""
    tensors = tensors_of(node.meta.get("val"))
    return {size for tensor in tensors for size in tensor.shape if is_symbolic(size)}


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
