"""Edits of FX graphs that keep their metadata: inserted calls, copies, other results, cleaning up."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from gtp_fx.graph.nodes import attention_dropout
from gtp_fx.graph.symbols import names_a_symbol
from gtp_fx.graph.torch_internals import return_flat, take_signature

_ATTRIBUTES = ("get_attr", "call_module")
CONSTANT = "gtp_fx_constant_"
"""What names of a graph's own constants begin with, which are no parameters or buffers of the model."""

META_KEYS = ("nn_module_stack", "stack_trace", "source_fn_stack", "custom")
"""The metadata that tells where in the model a node comes from."""


LAYER = "gtp_fx_layer"
"""Meta key of a node that is the whole call of a layer, whose `gtp_fx.capture.layers.Layer` it holds."""

RECORDED = "gtp_recorded"
"""Meta key of a value that nothing in the graph may read, and that a record of the graph names."""


def constant_names(is_taken: Callable[[str], bool]) -> Iterator[str]:
    """Yield names for a graph's own constants, in order, but for those that are taken."""
    return (name for name in map(f"{CONSTANT}{{}}".format, itertools.count()) if not is_taken(name))


def origin_of(node: fx.Node, target: Any) -> dict[str, Any]:
    """Return the metadata of a call of `target` that is made in place of `node`: its origin, and its layer.

    The layer goes along where the operator is the same. A `Layer` says itself whether the call is still its own.
    """
    keys = (*META_KEYS, LAYER) if target == node.target else META_KEYS
    return {key: node.meta[key] for key in keys if key in node.meta}


def call(graph: fx.Graph, target: Any, *args: Any, like: fx.Node) -> fx.Node:
    """Insert a call at the graph's insertion point, with the origin (layer, stack trace) of the node `like`."""
    _name_no_symbol(target, args)
    node = graph.call_function(target, args)
    node.meta = origin_of(like, target)
    return node


@dataclass
class Emitter:
    """Inserts calls into a graph, in order, with the origin (layer, stack trace) of another node.

    graph: the graph to insert into.
    like: the node whose origin they get.
    before: the node that they are inserted before; the graph's own insertion point where None.
    inserted: the nodes inserted so far.
    """

    graph: fx.Graph
    like: fx.Node
    before: fx.Node | None = None
    inserted: set[fx.Node] = field(default_factory=set)

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        with contextlib.nullcontext() if self.before is None else self.graph.inserting_before(self.before):
            node = call(self.graph, target, *args, like=self.like)
        self.inserted.add(node)
        return node


def replace(old: fx.Node, new: fx.Node) -> None:
    """Put `new` in the place of `old`, whose value it has, and erase `old`.

    What is known of the value goes along, so a pass may rewrite what reads it in the same walk.
    """
    if "val" in old.meta:
        new.meta.setdefault("val", old.meta["val"])
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def set_args(node: fx.Node, args: tuple[Any, ...]) -> None:
    """Change a node's arguments. The next `propagate_shapes` recomputes its value."""
    if args != node.args:
        _name_no_symbol(node.target, args)
        node.args = args
        node.meta.pop("val", None)


def _name_no_symbol(target: Any, arguments: Any) -> None:
    """Refuse arguments that hold a symbol's prime: the graph would work for that one batch size, which nobody has.

    Whatever writes a size into a graph does so by a function of this module.
    """
    assert not names_a_symbol(arguments), f"a batch size is written as a number: {target}{arguments}"


def copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a new graph module over the same parameters, so that a pass never changes its input."""
    return copy_with_nodes(gm)[0]


def copy_with_nodes(gm: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """Return the same, and each node's copy."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.output(graph.graph_copy(gm.graph, copies))
    output.meta = dict(gm.graph.output_node().meta)
    take_signature(graph, gm.graph)
    # What a graph reads may be gone for now: a layer was replaced, which is called. So attributes are given one by one.
    held = {str(node.target): _attribute(gm, str(node.target)) for node in graph.nodes if node.op in _ATTRIBUTES}
    new = fx.GraphModule(held, graph, class_name=type(gm).__name__)
    new.training = gm.training
    new.meta.update(gm.meta)
    return new, dict(zip(gm.graph.nodes, graph.nodes, strict=True))


def with_inputs(gm: fx.GraphModule, names: Sequence[str]) -> fx.GraphModule:
    """Return a copy over the same parameters that takes more inputs, after its own, and reads none of them."""
    new, _ = copy_with_nodes(gm)
    last = new.graph.find_nodes(op="placeholder")[-1]
    with new.graph.inserting_before(last.next):
        for name in names:
            new.graph.placeholder(name)
    new.recompile()
    return new


def _attribute(gm: fx.GraphModule, path: str) -> Any:
    """Return what `gm` has at a path; an empty tensor where it has nothing there."""
    value: Any = gm
    for name in path.split("."):
        value = getattr(value, name, None)
    return torch.empty(0) if value is None else value


def returning(gm: fx.GraphModule, results: Callable[[dict[fx.Node, fx.Node]], list[fx.Node]]) -> fx.GraphModule:
    """Return a graph module over the same parameters that takes `gm`'s inputs and returns a flat list of other values.

    results: maps each node to its copy; inserts what it needs among the copies and returns the nodes to return.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(gm.graph, copies)
    take_signature(graph, gm.graph)
    returned = results(copies)
    graph.output(returned)
    return_flat(graph, returned)
    graph.eliminate_dead_code()
    return fx.GraphModule(gm, graph)


def finish(gm: fx.GraphModule, draws: bool = True) -> fx.GraphModule:
    """Remove what nothing uses, check the graph, regenerate its code.

    draws: whether what draws random numbers stays in any case, since those after it depend on it. Where a pass has run
        a block anew for fewer tokens, the dropout of the old one would keep all of it.
    """
    gm.graph.eliminate_dead_code(is_impure_node=_stays if draws else _stays_but_for_draws)  # checks the graph first
    gm.recompile()
    return gm


def _stays(node: fx.Node) -> bool:
    """Return whether a node is read, or has an effect beside its value.

    Torch keeps attention because it may draw random numbers; without dropout it draws none. What a record names stays.
    """
    if node.users:  # which torch asks last
        return True
    if node.target is torch.ops.aten.scaled_dot_product_attention.default:
        return bool(attention_dropout(node))
    return bool(node.is_impure()) or RECORDED in node.meta


def _stays_but_for_draws(node: fx.Node) -> bool:
    """Return the same, where random numbers that nobody reads are no effect."""
    return bool(node.users) or bool(node.is_impure(impure_random=False)) or RECORDED in node.meta


def share(gm: fx.GraphModule, owner: nn.Module) -> None:
    """Let `gm` read everything but its constants from `owner`, in place, and follow whatever is put into that.

    It holds the very same dicts. Its constants are plain attributes.
    """
    held = {**gm._parameters, **gm._buffers, **gm._modules}  # a copy has registered what were plain attributes
    constants = {name: value for name, value in held.items() if name.startswith(CONSTANT)}
    gm.__dict__.update(constants)
    gm._parameters, gm._buffers, gm._modules = owner._parameters, owner._buffers, owner._modules
    gm._non_persistent_buffers_set = owner._non_persistent_buffers_set
