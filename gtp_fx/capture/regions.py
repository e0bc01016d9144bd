"""Regions of a forward: `torch.no_grad()`, `torch.autocast(…)`, parts that are recomputed or compiled together.

Tracing leaves them in a graph in two forms. torch.export makes a graph of its own of each, called by a higher-order
operator; Dynamo writes calls where a context begins and ends. Either way what the contexts mean is written into the
graph, and the contexts are taken out:

- Autocast becomes the casts that it would make (`gtp_fx.capture.autocast_casts`).
- Values that leave a region without gradients are detached.
- The graphs that are called are inlined (`gtp_fx.capture.called_graphs`).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.capture.autocast_casts import Autocast, Caster
from gtp_fx.capture.called_graphs import AUTOCAST_REGION, GRAD_REGION, call_of, inlined, module_at
from gtp_fx.errors import CaptureError
from gtp_fx.graph import edit
from gtp_fx.graph.torch_internals import ENTER_AUTOCAST, EXIT_AUTOCAST, SET_GRAD, region_operator

AUTOCAST = "autocast"
"""Key in a graph's `meta`: states of autocast that were written out, and that the graph's numbers depend on."""


@dataclass(frozen=True)
class _Context:
    """What is switched at a node.

    grad: whether gradients are recorded.
    autocast: autocast's state by device type; a device is missing where the forward doesn't say.
    """

    grad: bool = True
    autocast: Mapping[str, Autocast] = field(default_factory=dict)

    def within(self, node: fx.Node) -> _Context:
        """Return the context in the graph that a higher-order operator calls, or behind a call that begins one."""
        name = region_operator(node.target)
        if name == GRAD_REGION or node.target is SET_GRAD:
            return replace(self, grad=bool(node.args[0]))
        if name == AUTOCAST_REGION or node.target is ENTER_AUTOCAST:
            arguments: tuple[Any, ...] = node.args[:3]
            device, dtype, enabled = arguments
            chosen = torch.get_autocast_dtype(device) if dtype is None else dtype
            return replace(self, autocast={**self.autocast, device: Autocast(bool(enabled), chosen)})
        return self


def has_regions(gm: fx.GraphModule) -> bool:
    """Return whether `opened` has something to do."""
    return any(_is_mark(node) or call_of(node) is not None for node in gm.graph.nodes)


def opened(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a graph without regions, which computes the same and has the same gradients. `gm` is not changed.

    Graphs that are called or not by what a tensor holds (`torch.cond`, loops) stay. Raises CaptureError where autocast
    does more in an operator than to cast its operands.
    """
    if has_regions(gm):
        gm = edit.copy_of(gm)
        touched = write_out(gm) | _write_marks_out(gm)
        gm = inlined(gm)
        gm.meta[AUTOCAST] = frozenset({*gm.meta.get(AUTOCAST, ()), *touched})
    return gm


def write_out(gm: fx.GraphModule) -> set[tuple[str, Autocast]]:
    """Write casts and detached values into the graphs that `gm` calls, in place. Its own nodes stay as they are.

    Return the states of autocast that the numbers depend on.

    Raises CaptureError where autocast does more in an operator than to cast its operands.
    """
    touched: set[tuple[str, Autocast]] = set()
    for body, context, without_grad in _bodies(gm, _Context(), {}):
        caster = Caster(body.graph)
        for node in list(body.graph.nodes):
            caster.cast_operands(node, context.autocast)
        touched |= caster.touched
        if without_grad:
            (output,) = body.graph.find_nodes(op="output")
            for value in _carrying_gradients(body.graph) & {*output.all_input_nodes}:
                if value.op != "placeholder":
                    output.replace_input_with(value, _detached(value, before=output))
        body.recompile()
    return touched


def _bodies(
    gm: fx.GraphModule, context: _Context, seen: dict[fx.GraphModule, _Context]
) -> Iterator[tuple[fx.GraphModule, _Context, bool]]:
    """Yield every graph that `gm` calls, its context, and whether it is one that switches gradients off."""
    for node in gm.graph.nodes:
        call = call_of(node)
        if call is None:
            continue
        body, inside = module_at(gm, node.args[call.body]), context.within(node)
        if body in seen:
            if seen[body] != inside:
                raise CaptureError(f"{node}: one compiled region is called under different contexts; compile it twice")
            continue
        seen[body] = inside
        yield from _bodies(body, inside, seen)
        yield body, inside, region_operator(node.target) == GRAD_REGION and not inside.grad


def _write_marks_out(gm: fx.GraphModule) -> set[tuple[str, Autocast]]:
    """Write out, in place, the contexts that calls begin and end in `gm` itself, and remove the calls.

    Return the states of autocast that the numbers depend on.
    """
    context, entered = _Context(), []
    contexts: dict[fx.Node, _Context] = {}
    for node in gm.graph.nodes:
        if node.target is ENTER_AUTOCAST:
            entered.append(context.autocast)
        if _is_mark(node):
            context = context.within(node)
            if node.target is EXIT_AUTOCAST:
                context = replace(context, autocast=entered.pop())
        # An item of a list belongs to where the list was made.
        contexts[node] = contexts[node.args[0]] if node.target is operator.getitem else context
    for node in _carrying_gradients(gm.graph):
        if not contexts[node].grad and node.op not in ("placeholder", "get_attr"):
            users = [user for user in node.users if contexts[user].grad or user.op == "output"]
            detached = _detached(node, before=node.next) if users else node
            for user in users:
                user.replace_input_with(node, detached)
    caster = Caster(gm.graph)
    for node, there in contexts.items():
        caster.cast_operands(node, there.autocast)
    for node in reversed(gm.graph.nodes):  # the end of an autocast names its beginning
        if _is_mark(node):
            gm.graph.erase_node(node)
    return caster.touched


def _carrying_gradients(graph: fx.Graph) -> set[fx.Node]:
    """Return the floating-point tensors that depend on a parameter or on an input."""
    found: set[fx.Node] = set()
    depending: set[fx.Node] = set()
    for node in graph.nodes:
        origin = node.op == "placeholder" or (node.op == "get_attr" and isinstance(_held(node), nn.Parameter))
        value = node.meta.get("val")
        whole = not isinstance(value, Tensor) or value.is_floating_point()
        if (origin or not depending.isdisjoint(node.all_input_nodes)) and whole:
            depending.add(node)
            if isinstance(value, Tensor):
                found.add(node)
    return found


def _held(node: fx.Node) -> Any:
    """Return the attribute that a node reads, or None where its graph has no module."""
    module: Any = node.graph.owning_module
    return None if module is None else operator.attrgetter(str(node.target))(module)


def _detached(value: fx.Node, before: fx.Node) -> fx.Node:
    """Return a detached copy of a node, inserted before another."""
    emit = edit.Emitter(value.graph, like=value, before=before)
    detached = emit(aten.detach.default, value)
    if "val" in value.meta:
        detached.meta["val"] = value.meta["val"]
    return detached


def _is_mark(node: fx.Node) -> bool:
    """Return whether a node begins or ends a context."""
    return any(node.target is mark for mark in (SET_GRAD, ENTER_AUTOCAST, EXIT_AUTOCAST))
