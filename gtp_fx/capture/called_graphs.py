"""Graphs that a graph calls by a higher-order operator, each once, and what inlines them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from gtp_fx.graph import edit
from gtp_fx.graph.torch_internals import region_operator, take_signature

GRAD_REGION, AUTOCAST_REGION = "wrap_with_set_grad_enabled", "wrap_with_autocast"
"""Higher-order operators that switch gradients off or on, and autocast, for the graph that they call."""


@dataclass(frozen=True)
class GraphCall:
    """Where a higher-order operator that runs a graph once has it among its arguments.

    body: place of the graph.
    operands: the graph's operands, of all arguments.
    """

    body: int
    operands: Callable[[tuple[Any, ...]], tuple[Any, ...]]


_CALLS: Mapping[str, GraphCall] = {
    GRAD_REGION: GraphCall(1, lambda args: args[2:]),
    AUTOCAST_REGION: GraphCall(4, lambda args: args[5:]),
    "wrap": GraphCall(0, lambda args: args[1:]),
    "tag_activation_checkpoint": GraphCall(0, lambda args: args[1:]),
    "wrap_activation_checkpoint": GraphCall(0, lambda args: args[1:]),
    "invoke_subgraph": GraphCall(0, lambda args: args[2:]),
    "hints_wrapper": GraphCall(0, lambda args: tuple(args[1])),
    "strict_mode": GraphCall(0, lambda args: tuple(args[1])),
}


def call_of(node: fx.Node) -> GraphCall | None:
    """Return how a node calls a graph; None where it calls none that can be inlined."""
    call = _CALLS.get(region_operator(node.target))
    return call if call is not None and isinstance(node.args[call.body], fx.Node) else None


def module_at(gm: fx.GraphModule, node: Any) -> fx.GraphModule:
    """Return the graph that a node reads as an attribute of `gm`."""
    body = operator.attrgetter(node.target)(gm)
    assert isinstance(body, fx.GraphModule)
    return body


def inlined(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a graph in which the graphs that `gm` calls are inlined, and no context is written out."""
    root = fx.GraphModule(gm, gm.graph)  # shares the parameters; takes the constants of the graphs that are called
    graph = fx.Graph()
    _Inliner(root, graph).run(gm, None)
    take_signature(graph, gm.graph)
    result = fx.GraphModule(root, graph, class_name=type(gm).__name__)
    result.meta.update(gm.meta)
    return edit.finish(result)


@dataclass
class _Inliner:
    """Copies graphs into one.

    root: module that gets the constants of the graphs that are called.
    graph: the graph that is built.
    """

    root: fx.GraphModule
    graph: fx.Graph

    def run(self, gm: fx.GraphModule, operands: tuple[Any, ...] | None) -> Any:
        """Copy `gm`'s nodes, with `operands` for its inputs, and return its result; None for the outermost graph's."""
        values: dict[fx.Node, Any] = {}
        given = iter(operands or ())
        for node in gm.graph.nodes:
            call = call_of(node)
            if node.op == "placeholder" and operands is not None:
                values[node] = next(given)
            elif node.op == "output" and operands is not None:
                return fx.map_arg(node.args[0], lambda n: values[n])
            elif node.op == "get_attr" and (operands is not None or self._only_called(gm, node)):
                values[node] = self._constant(gm, node)
            elif call is not None:
                inner = fx.map_arg(call.operands(node.args), lambda n: values[n])
                values[node] = self.run(module_at(gm, node.args[call.body]), tuple(inner))
            elif node.target is operator.getitem and isinstance(values.get(node.args[0]), tuple | list):
                values[node] = values[node.args[0]][node.args[1]]
            else:
                values[node] = self.graph.node_copy(node, lambda n: values[n])
        return None

    def _only_called(self, gm: fx.GraphModule, node: fx.Node) -> bool:
        """Return whether an attribute is a graph that is inlined wherever it is used."""
        held = operator.attrgetter(str(node.target))(gm)
        return isinstance(held, fx.GraphModule) and all(call_of(user) is not None for user in node.users)

    def _constant(self, gm: fx.GraphModule, node: fx.Node) -> Any:
        """Return a node that reads a called graph's attribute from the root; nothing for a graph that is inlined."""
        if self._only_called(gm, node):
            return None
        name = f"{str(node.target).replace('.', '_')}_{len(self.graph.nodes)}"
        setattr(self.root, name, operator.attrgetter(str(node.target))(gm))
        read = self.graph.get_attr(name)
        read.meta = dict(node.meta)
        return read
