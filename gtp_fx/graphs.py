"""Small questions about FX graphs that several passes ask, and the steps that every rewrite ends with."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from gtp_fx.errors import Refusal

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
META_KEYS = ("nn_module_stack", "stack_trace", "source_fn_stack", "custom")


def is_input(node: fx.Node) -> bool:
    """A value that the graph doesn't compute: an argument, a parameter, a buffer."""
    return node.op in ("placeholder", "get_attr")


def operator_name(node: fx.Node) -> str:
    """The operator as a person reads it: "aten.linear.default"."""
    return str(node.target) if node.op == "call_function" else node.op


def layer_name(node: fx.Node) -> str:
    """The path of the module that the node came from ("blocks.3.attn"), or "" where the graph keeps none."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    return str(path).replace("L['self'].", "").removeprefix("L['self']").strip(".")


def source_line(node: fx.Node) -> str:
    """Where in the model's source the node was called, "timm/layers/attention.py:124", or "" where the graph doesn't know."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return ""
    file, line = frames[-1]
    for folder in ("/site-packages/", "/dist-packages/"):
        file = file.rpartition(folder)[2]
    return f"{os.path.relpath(file) if os.path.isabs(file) and file.startswith(os.getcwd()) else file}:{line}"


def refusal(node: fx.Node, reason: str) -> Refusal:
    """What the compiler leaves as it is at `node`, and why."""
    return Refusal(layer_name(node), operator_name(node), reason, source_line(node))


def descendants(node: fx.Node) -> set[fx.Node]:
    """Every node that depends on `node`."""
    return _closure([node], lambda n: n.users)


def ancestors(node: fx.Node) -> set[fx.Node]:
    """Every node that `node` depends on."""
    return _closure([node], lambda n: n.all_input_nodes)


def _closure(start: list[fx.Node], step: Any) -> set[fx.Node]:
    found: set[fx.Node] = set()
    pending = list(start)
    while pending:
        for other in step(pending.pop()):
            if other not in found:
                found.add(other)
                pending.append(other)
    return found


def call(graph: fx.Graph, target: Any, *args: Any, like: fx.Node) -> fx.Node:
    """Insert a call at the graph's insertion point, with the origin (layer, stack trace) of the node `like`."""
    node = graph.call_function(target, args)
    node.meta = {key: like.meta[key] for key in META_KEYS if key in like.meta}
    return node


def set_args(node: fx.Node, args: tuple[Any, ...]) -> None:
    """Change a node's arguments; its value is computed anew by the next `propagate_shapes`."""
    if args != node.args:
        node.args = args
        node.meta.pop("val", None)


def copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph module of its own over the same parameters, so that a pass never touches its input."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, values))
    graph._codegen = gm.graph._codegen
    new = fx.GraphModule(gm, graph, class_name=type(gm).__name__)
    new.meta.update(gm.meta)
    return new


def returning(gm: fx.GraphModule, results: Callable[[dict[fx.Node, fx.Node]], list[fx.Node]]) -> fx.GraphModule:
    """A graph module over the same parameters that takes `gm`'s inputs and returns a flat list of other values.

    results: told each node's copy, it inserts what it wants among them and says which nodes are returned.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(gm.graph, copies)
    graph._codegen = gm.graph._codegen
    found = results(copies)
    graph.output(found)
    taken: Any = gm.graph._codegen
    if hasattr(taken, "pytree_info"):
        out_spec = pytree.tree_structure(found)
        graph.set_codegen(type(taken)(taken.pytree_info._replace(out_spec=out_spec)))
    graph.eliminate_dead_code()
    return fx.GraphModule(gm, graph)


def finish(gm: fx.GraphModule) -> fx.GraphModule:
    """Drop what nothing uses, check the graph, regenerate its code."""
    gm.graph.eliminate_dead_code(is_impure_node=_is_impure)
    gm.graph.lint()
    gm.recompile()
    return gm


def _is_impure(node: fx.Node) -> bool:
    """Attention may draw random numbers, so torch keeps it; without dropout it draws none."""
    if node.target is torch.ops.aten.scaled_dot_product_attention.default:
        return bool(attention_dropout(node))
    return bool(node.is_impure())


def attention_dropout(node: fx.Node) -> Any:
    """dropout_p of aten.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, …)."""
    return node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)


def count_nodes(graph: fx.Graph, targets: Iterable[Any]) -> int:
    wanted = set(targets)
    return sum(node.op == "call_function" and node.target in wanted for node in graph.nodes)


def tensors_of(value: object) -> list[torch.Tensor]:
    """The tensors in a node's value, which may be a list of them."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [v for v in value if isinstance(v, torch.Tensor)] if isinstance(value, list | tuple) else []
