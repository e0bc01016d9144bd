"""Small queries about FX nodes and graphs that several passes need."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from gtp_fx.errors import Refusal

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def is_input(node: fx.Node) -> bool:
    """Return whether the graph doesn't compute the value: an argument, a parameter, a buffer."""
    return node.op in ("placeholder", "get_attr")


def operator_name(node: fx.Node) -> str:
    """Return the operator as a person reads it: "aten.linear.default"."""
    return str(node.target) if node.op == "call_function" else node.op


def layer_name(node: fx.Node) -> str:
    """Return the path of the module that the node came from ("blocks.3.attn"), or "" where the graph keeps none."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    return str(path).replace("L['self'].", "").removeprefix("L['self']").strip(".")


def source_line(node: fx.Node) -> str:
    """Return where in the model's source the node was called.

    A file and a line, such as "timm/layers/attention.py:124"; "" where the graph keeps no stack trace.
    """
    frames = [frame for frame in _FRAME.findall(node.meta.get("stack_trace") or "") if not frame[0].startswith("<")]
    if not frames:
        return ""
    file, line = frames[-1]
    for folder in ("/site-packages/", "/dist-packages/"):
        file = file.rpartition(folder)[2]
    return f"{os.path.relpath(file) if os.path.isabs(file) and file.startswith(os.getcwd()) else file}:{line}"


def bodies_of(node: fx.Node) -> list[fx.Graph]:
    """Return the graphs that a higher-order operator (`cond`, `map`) is given, and those inside them."""
    owner = node.graph.owning_module
    given = [arg for arg in node.all_input_nodes if arg.op == "get_attr" and owner is not None]
    modules = [operator.attrgetter(str(arg.target))(owner) for arg in given]
    bodies = [module.graph for module in modules if isinstance(module, fx.GraphModule)]
    return bodies + [inside for body in bodies for call in body.nodes for inside in bodies_of(call)]


def names_in_place(name: str) -> bool:
    """Return whether a function's name says that it changes its first argument: "add_", "setitem"."""
    return (name.endswith("_") and not name.startswith("__")) or name.strip("_") == "setitem"


def refusal(node: fx.Node, reason: str) -> Refusal:
    """Return a refusal: what the compiler doesn't change at `node`, and why."""
    return Refusal(layer_name(node), operator_name(node), reason, source_line(node))


def descendants(node: fx.Node) -> set[fx.Node]:
    """Return every node that depends on `node`."""
    return _closure([node], lambda n: n.users)


def ancestors(node: fx.Node) -> set[fx.Node]:
    """Return every node that `node` depends on."""
    return _closure([node], lambda n: n.all_input_nodes)


def _closure(start: list[fx.Node], step: Any) -> set[fx.Node]:
    """Return everything that repeated steps from `start` reach."""
    found: set[fx.Node] = set()
    pending = list(start)
    while pending:
        for other in step(pending.pop()):
            if other not in found:
                found.add(other)
                pending.append(other)
    return found


def attention_dropout(node: fx.Node) -> Any:
    """Return dropout_p of aten.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, …)."""
    return node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)


def count_nodes(graph: fx.Graph, targets: Iterable[Any]) -> int:
    """Count the calls of any of `targets`."""
    wanted = set(targets)
    return sum(node.op == "call_function" and node.target in wanted for node in graph.nodes)


def tensors_of(value: object) -> list[torch.Tensor]:
    """Return the tensors in a node's value, which may be a list of them."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [v for v in value if isinstance(v, torch.Tensor)] if isinstance(value, list | tuple) else []


def pads_with_zeros(node: fx.Node) -> bool:
    """Return whether a padding adds zeros; aten.pad has a mode before the value."""
    mode_and_value = (*node.args[2:], *node.kwargs.values())
    return all(given in ("constant", None, 0) for given in mode_and_value)


def only_user(node: fx.Node) -> fx.Node | None:
    """Return the one reader of a node; None where there are several or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None
