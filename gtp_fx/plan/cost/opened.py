"""FLOPs of an operator without a formula here: it is run on meta tensors, and torch's own formulas count what it calls.

So whatever `torch.utils.flop_counter` counts, counts here too: composite operators by what they decompose into, those
that have a formula in torch's registry, and a user's own with `register_flop_formula`. Attention counts as its math,
because a CPU's fused operator has no formula.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from gtp_fx.graph import operators
from gtp_fx.graph.nodes import bodies_of, tensors_of
from gtp_fx.graph.symbols import at_batch
from gtp_fx.graph.torch_internals import (
    decomposes,
    is_higher_order,
    is_operator,
    registered_formula,
    run_counted,
    tracing_lock,
)

_FREE = {
    operator
    for family in (
        operators.SOFTMAXES,
        operators.FEATURE_NORMS,
        operators.CHANNEL_NORMS,
        operators.DROPOUTS,
        operators.VIEWS,
        operators.FLATTENINGS,
        operators.SQUEEZES,
        operators.WITHOUT_COPY,
        operators.CASTS_LIKE,
        operators.PADDINGS,
        operators.POOLINGS,
        operators.RESIZINGS,
        operators.CONSTANTS,
        operators.BINARY,
        operators.UNARY,
    )
    for operator in family
}
"""Operators that multiply no matrices, whatever they decompose into: they needn't be run to know, which takes time."""
_KNOWN = ("aten", "prim", "prims", "gtp_fx", "gtp_fx_kernels", "torchvision", "_operator")
"""Namespaces whose operators are known: those that multiply are in torch's registry or in PRODUCTS_WITHOUT_FORMULA."""
_EXAMPLES = 10_000
"""Calls that are remembered: every pass counts the graph anew, and most of it hasn't changed."""


@dataclass(frozen=True)
class Opened:
    """What is inside one call.

    flops: FLOPs by torch's formulas.
    uncounted: why these aren't all: the operator that multiplies and has no formula, or why the call couldn't be run;
        empty where they are all.
    """

    flops: int = 0
    uncounted: str = ""


@dataclass(frozen=True)
class _Like:
    """A tensor argument: its shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def opened(node: fx.Node, shapes: Mapping[fx.Node, Sequence[int]] | None = None, batch: int = 1) -> Opened:
    """Count one node.

    shapes: of operands, instead of those in the graph.
    batch: images in each symbolic batch.
    """
    target = node.target
    if node.op != "call_function" or not _may_multiply(target, len(flop_registry)):
        return Opened()
    if is_higher_order(target) and registered_formula(target) is None and (bodies := bodies_of(node)):
        # What multiplies nothing costs nothing, however often it is called.
        inside = [call.target for body in bodies for call in body.nodes if call.op == "call_function"]
        if not any(_may_multiply(called, len(flop_registry)) for called in inside):
            return Opened()

    def like(operand: fx.Node) -> Any:
        value = operand.meta.get("val")
        if isinstance(value, torch.Tensor):
            given = value.shape if shapes is None or operand not in shapes else shapes[operand]
            return _Like(tuple(at_batch(int(size), batch) for size in given), value.dtype)
        if isinstance(value, list | tuple):
            tensors = tensors_of(value)
            return [_Like(tuple(at_batch(size, batch) for size in x.shape), x.dtype) for x in tensors]
        return at_batch(value, batch) if isinstance(value, int) and not isinstance(value, bool) else value

    result = None if shapes is not None else like(node)
    leaves, spec = pytree.tree_flatten((*fx.map_arg((node.args, node.kwargs), like), result))
    return _count(target, tuple(leaves), spec, len(flop_registry))


@lru_cache(_EXAMPLES)
def _count(target: Any, leaves: tuple[Any, ...], spec: pytree.TreeSpec, _registered: int) -> Opened:
    """Count one call, by its operator's own formula or by running it on meta tensors.

    leaves, spec: arguments, keyword arguments, and the result, None where it isn't known.
    _registered: the size of torch's registry, which a user may add to.
    """

    def empty(leaf: Any) -> Any:
        if isinstance(leaf, _Like):
            return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
        return torch.device("meta") if isinstance(leaf, torch.device) else leaf

    args, kwargs, result = pytree.tree_unflatten([empty(leaf) for leaf in leaves], spec)
    formula = registered_formula(target)
    if formula is None and is_higher_order(target):
        return Opened(uncounted="it runs a graph of its own, whose products aren't counted")
    try:
        if formula is not None and (result is not None or is_higher_order(target)):
            return Opened(int(formula(*args, **kwargs, out_val=result)))
        with tracing_lock(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the kernel's choice is the process's
            flops, called = run_counted(target, args, kwargs)
    except Exception as error:  # whatever an operator or a formula raises
        return Opened(uncounted=f"torch can't count it by shapes alone ({str(error).partition(chr(10))[0]})")
    without = [operator for operator in called if _has_no_formula(operator)]
    return Opened(flops, f"{without[0]} has no formula in torch.utils.flop_counter" if without else "")


@lru_cache(None)
def _may_multiply(target: Any, _registered: int) -> bool:
    """Return whether an operator may multiply matrices, so that it has to be run to know."""
    if is_higher_order(target):
        return True
    if not is_operator(target) or target in _FREE:
        return False
    return registered_formula(target) is not None or decomposes(target) or _has_no_formula(target)


def _has_no_formula(operator: Any) -> bool:
    """Return whether an operator that calls no others multiplies matrices, or may, and torch has no formula for it."""
    namespace, _, name = operator.name().partition("::")
    return namespace not in _KNOWN or name.partition(".")[0] in operators.PRODUCTS_WITHOUT_FORMULA
