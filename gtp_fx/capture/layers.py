"""Layers of a model that its graph calls as they are: leaf modules whose forward is one operator on one tensor.

A graph reads tensors, and a model is made of modules: of hooks on them, of adapters and quantised layers in their
place. Where an operator is all that a leaf module's call does (a linear layer, a norm, an activation), the graph that
is run calls the module. Which operators these are is recorded where the model is captured; a pass that makes another
operator of one makes an end of that.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from gtp_fx.graph.edit import LAYER
from gtp_fx.graph.nodes import tensors_of
from gtp_fx.graph.torch_internals import is_higher_order

OWN_CALLS = "gtp_fx_own_calls"
"""Key in a graph module's `meta`: paths of layers that no pass may join with others or take apart.

Somebody reads or replaces what they do: by a hook, a subclass, an adapter.
"""

USED = "gtp_fx_used"
"""Key in a captured graph's `meta`: paths of the modules that forward calls or reads, and of those that hold them; None
where that isn't known.
"""


@dataclass(frozen=True)
class Layer:
    """A leaf module that a node calls.

    path: its name in the model.
    target: the operator that its forward is.
    position: which of the operator's arguments the module is given.
    others: the other arguments; parameters by their names.
    """

    path: str
    target: Any
    position: int
    others: tuple[Any, ...]

    def is_called_by(self, node: fx.Node) -> bool:
        """Return whether a node still is the layer's call, on this input or on another."""
        return node.target == self.target and _split(node) == (self.position, self.others)

    def input_of(self, node: fx.Node) -> Any:
        """Return what the node gives to the layer."""
        return node.args[self.position]


@contextlib.contextmanager
def plain_calls(model: nn.Module) -> Iterator[dict[nn.Module, bool]]:
    """Record the modules that are called within the context: whether always with one tensor, returning one.

    Only leaf modules are plain.
    """
    plain: dict[nn.Module, bool] = {}

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if torch.compiler.is_dynamo_compiling():  # inside of torch.cond, say, which calls no layers
            return
        one = len(args) == 1 and isinstance(args[0], Tensor) and not kwargs and isinstance(output, Tensor)
        plain[module] = one and plain.get(module, True) and _is_leaf(module)

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in model.modules()]
    try:
        yield plain
    finally:
        for handle in handles:
            handle.remove()


def mark_layers(gm: fx.GraphModule, model: nn.Module, plain: Collection[nn.Module]) -> None:
    """Set `LAYER` in the metadata of the nodes that are the whole call of a leaf module, in place.

    plain: modules that take one tensor and return one.
    """
    calls: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "call_function" and (stack := node.meta.get("nn_module_stack")):
            calls.setdefault(list(stack)[-1], []).append(node)
    modules = dict(model.named_modules(remove_duplicate=False))
    for nodes in calls.values():
        path = str(list(nodes[0].meta["nn_module_stack"].values())[-1][0])
        module = modules.get(path)
        if len(nodes) != 1 or module is None or module not in plain:
            continue
        (node,) = nodes
        found = _split(node)
        if found is None or len(tensors_of(node.meta.get("val"))) != 1:
            continue
        position, others = found
        if all(name.startswith(f"{path}.") for name in _names(others)):
            node.meta[LAYER] = Layer(path, node.target, position, others)


def layer_paths(gm: fx.GraphModule) -> set[str]:
    """Return the paths of the layers that a captured graph calls."""
    return {node.meta[LAYER].path for node in gm.graph.nodes if LAYER in node.meta}


def used_paths(gm: fx.GraphModule, model: nn.Module, called: Collection[nn.Module]) -> frozenset[str] | None:
    """Return the paths of modules for `USED`.

    called: the modules that were called while `model` was traced; none where the trace doesn't tell.
    """
    if not called or any(is_higher_order(node.target) for node in gm.graph.nodes):
        return None
    paths = {path for path, module in model.named_modules(remove_duplicate=False) if module in called}
    read = [node for node in gm.graph.find_nodes(op="get_attr") if node.users]  # torch.export lists all there are
    paths |= {str(node.target).rpartition(".")[0] for node in read}
    parts = (path.split(".") for path in paths)
    return frozenset(".".join(names[:end]) for names in parts for end in range(len(names) + 1))


def stays_whole(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether a node is the call of a layer that no pass may join with others or take apart."""
    layer = node.meta.get(LAYER)
    return layer is not None and layer.path in gm.meta.get(OWN_CALLS, ())


def _is_leaf(module: nn.Module) -> bool:
    """Return whether a module holds no others, and has a forward of one argument that has to be given."""
    if module._modules:
        return False
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # a forward that isn't written in Python
        return False
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return len(needed) <= 1


@dataclass(frozen=True)
class _Parameter:
    name: str


def _split(node: fx.Node) -> tuple[int, tuple[Any, ...]] | None:
    """Return where the one value stands that a call is given beside parameters, and the other arguments.

    None where there are several, or where it stands in a list.
    """
    given = [operand for operand in node.all_input_nodes if operand.op != "get_attr"]
    places = [place for place, argument in enumerate(node.args) if argument in given]
    if len(given) != 1 or len(places) != 1:
        return None
    others = node.args[: places[0]] + node.args[places[0] + 1 :], sorted(node.kwargs.items())
    named: Any = fx.map_arg(others, lambda n: _Parameter(str(n.target)))  # type: ignore[arg-type,return-value]
    return places[0], _frozen(named)


def _frozen(values: Any) -> tuple[Any, ...]:
    return tuple(_frozen(value) if isinstance(value, list | tuple) else value for value in values)


def _names(others: tuple[Any, ...]) -> list[str]:
    """Return the names of the parameters among arguments."""
    nested = [_names(value) for value in others if isinstance(value, tuple)]
    return [value.name for value in others if isinstance(value, _Parameter)] + [
        name for some in nested for name in some
    ]
