"""The verifier run after every pass: it recomputes every value's shape by running the graph on fake tensors.

A node with a size that a pass forgot to repair can't run. So it is found here, by its name, and not by a user.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from gtp_fx.graph.nodes import is_input, layer_name, operator_name, tensors_of
from gtp_fx.graph.symbols import fixed_symbols
from gtp_fx.graph.torch_internals import is_fake, is_higher_order, mode_of, new_fake
from gtp_fx.ops.register import shapes_of

aten = torch.ops.aten


class InconsistentGraph(AssertionError):
    """A pass made a graph that can't run. This is a defect of gtp_fx; please report it with the message."""


def propagate_shapes(gm: fx.GraphModule, after: str) -> None:
    """Bring `meta["val"]` of every node up to date. Raises InconsistentGraph where a node can't run.

    A node is run where its value is missing (it is new, or `edit.set_args` changed it) or the shape of one of its
    operands has changed. The others keep their values, so a pass that changes one block costs one block. What the same
    call of operands of the same forms has made is made again without running it: blocks are mostly alike.

    after: name of the pass that made the graph, for the error.
    """
    fakes = [t for node in gm.graph.nodes if is_input(node) for t in tensors_of(node.meta.get("val"))]
    # The graph's own mode, not `detect_fake_mode`'s answer: inside a backend that is Dynamo's, whose sizes are symbols.
    mode = mode_of(fakes[0]) if fakes else contextlib.nullcontext()  # a piece between graph breaks may read no tensor
    changed: set[fx.Node] = set()
    known: dict[Any, Any] = {}
    with mode, torch.no_grad():
        for node in gm.graph.nodes:
            stale = "val" not in node.meta or not changed.isdisjoint(node.all_input_nodes)
            if node.op != "call_function" or not stale:
                continue
            if is_higher_order(node.target) and "val" in node.meta:
                continue  # it is a barrier: its operands always come whole, so that its value keeps its form
            call = _call(node)
            value = _another(known[call]) if call in known else _run(node, after)
            if call is not None and all(map(_is_known_by_form, value if type(value) in (list, tuple) else [value])):
                known[call] = value
            if "val" not in node.meta or _form(node.meta["val"]) != _form(value):
                changed.add(node)
            node.meta["val"] = value


def _call(node: fx.Node) -> Any:
    """Return what the form of a call's value depends on, to be compared; None where that can't be."""
    call = node.target, _described(node.args), _described(node.kwargs)
    try:
        hash(call)
    except TypeError:
        return None
    return call


def _described(argument: Any) -> Any:
    """Return an argument with forms for its nodes; numbers with their types, for 1, 1.0 and True are equal."""
    if isinstance(argument, fx.Node):
        return _described(argument.meta["val"]) if "val" in argument.meta else argument
    if isinstance(argument, torch.Tensor):
        return argument.shape, argument.stride(), argument.dtype, argument.device
    if isinstance(argument, list | tuple):
        return type(argument), tuple(map(_described, argument))
    if isinstance(argument, dict):
        return tuple((key, _described(value)) for key, value in argument.items())
    return type(argument), argument


def _is_known_by_form(value: Any) -> bool:
    """Return whether a value is a tensor of which shape, strides, dtype and device say all."""
    return is_fake(value) and value.layout == torch.strided and not value.is_complex() and not value.is_quantized


def _another(value: Any) -> Any:
    """Return a value of the same form: a tensor, or several."""
    if isinstance(value, list | tuple):
        return type(value)(map(_another, value))
    return new_fake(mode_of(value), value.shape, value.stride(), value)


def _run(node: fx.Node, after: str) -> Any:
    """Run a node on its operands' fake values. Raises InconsistentGraph where it can't run."""
    args: Any
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    try:
        if (shape := _shape_like_first(node.target, args)) is not None:
            return args[0].new_empty(shape)
        return (shapes_of(node.target) or node.target)(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:
        place = layer_name(node) or "the graph"
        raise InconsistentGraph(
            f"after {after}: {operator_name(node)} ({node.name}) in {place} can't run: {error}"
        ) from error


def _shape_like_first(target: Any, args: tuple[Any, ...]) -> tuple[int, ...] | None:
    """Return the shape of what a linear layer or a norm makes of contiguous tokens; None where it has to be run.

    Torch opens both for each new size of a fake tensor, which takes milliseconds; a shortened stream has a size for
    each block. Sizes that don't fit are left for the operator itself to refuse, and casts for autocast to
    make.
    """
    if target not in (aten.linear.default, aten.layer_norm.default) or not args[0].is_contiguous():
        return None
    device = args[0].device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return None
    shape, weight = tuple(args[0].shape), args[1]
    if target is aten.layer_norm.default:
        return shape if list(shape[-len(weight) :]) == list(weight) else None
    return (*shape[:-1], weight.shape[0]) if weight.dim() == 2 and shape[-1:] == weight.shape[1:] else None


def _form(value: Any) -> Any:
    """Return what the users of a value depend on: shapes, dtypes, strides and devices."""
    return [(t.shape, t.stride(), t.dtype, t.device) for t in tensors_of(value)] or value


def check_outputs(
    before: fx.GraphModule, after: fx.GraphModule, sizes: Mapping[int, tuple[int, int]] | None = None
) -> None:
    """Compare what a rewritten graph returns with the original.

    sizes: a dimension of some outputs, by their place among all of them, and the size that it has to have by now.

    Raises InconsistentGraph where shapes or dtypes differ, or where the rewritten graph works for one batch size only.
    """
    if fixed := fixed_symbols(after.graph):
        raise InconsistentGraph(f"rewriting fixed the batch size in {', '.join(node.name for node in fixed)}")
    old, new = _signature(before, sizes or {}), _signature(after, {})
    if old != new:
        raise InconsistentGraph(f"the rewritten graph returns {new}, the original {old}")


def _signature(gm: fx.GraphModule, sizes: Mapping[int, tuple[int, int]]) -> list[str]:
    """Return the shape and dtype of every output. sizes: of some dimensions, as in `check_outputs`."""
    found = []
    for number, leaf in enumerate(pytree.tree_leaves(gm.graph.output_node().args[0])):
        for value in tensors_of(leaf.meta.get("val")) if isinstance(leaf, fx.Node) else ():
            shape = list(value.shape)
            if number in sizes:
                dim, size = sizes[number]
                shape[dim] = size
            found.append(f"{tuple(shape)} {value.dtype}")
    return found


def rounding_tolerance(dtype: torch.dtype) -> float:
    """Return how far compiled may be from eager, as |c - e| / |e| of one image's logits.

    Fusing changes the order of sums and, below float32, skips roundings between operators. Some hundred independent
    roundings in a row add up to about ten units in the last place, which is 1e-6 in float32. But rounding may also swap
    two tokens of nearly equal score at the threshold of the selection, so 1e-3 is allowed. One wrongly gathered token
    gives some per cent.
    """
    return max(1e-3, 10 * torch.finfo(dtype).eps)
