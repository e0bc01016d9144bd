"""Composite operators without a rule are opened by torch's own decompositions, so that one vocabulary is left.

torch spells one thing in many ways: `concat` is `cat`, `mT` a `transpose`, `addcmul` a `mul` and an `add`. None of them
is listed here. What has a rule (`gtp_fx.types.rules`) is the vocabulary and stays whole. Everything else for which
torch has a decomposition is traced through it, again and again, until only the vocabulary is left. Where something else
would be left, the operator stays as it is, so that a message names what the user wrote.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]
from torch.utils import _pytree as pytree

from gtp_fx.graph.edit import META_KEYS
from gtp_fx.graph.nodes import tensors_of
from gtp_fx.graph.torch_internals import decomposes, decomposition_tables, is_fake, is_operator, trace_functional
from gtp_fx.types import rules as _rules
from gtp_fx.types.rules.registry import find, has_own_rule

assert _rules

_DEPTH = 8
"""Decompositions inside each other; torch's own are three deep at most."""


def _extreme(reduce: Any, place: Any) -> Callable[..., Any]:
    """Return values and indices as two operators: a reader of one alone doesn't hang on the other."""
    return lambda x, dim, keepdim=False: (reduce(x, [dim], keepdim), place(x, dim, keepdim))


def _mean_beside(spread: Any) -> Callable[..., Any]:
    """Return a variance or deviation and the mean as two operators."""
    return lambda x, dim=None, *, correction=None, keepdim=False: (
        spread(x, dim, correction=correction, keepdim=keepdim),
        aten.mean.dim(x, dim, keepdim),
    )


def _gated(x: Any, state: Any, of_x: Any, of_state: Any, bias_x: Any = None, bias_state: Any = None) -> Any:
    """Return the next state of a gated recurrent unit: x and state of [N, C], as torch computes it, row by row."""
    new = aten.chunk.default(aten.linear.default(x, of_x, bias_x), 3, -1)
    old = aten.chunk.default(aten.linear.default(state, of_state, bias_state), 3, -1)
    reset, update = (aten.sigmoid.default(aten.add.Tensor(new[part], old[part])) for part in (0, 1))
    candidate = aten.tanh.default(aten.add.Tensor(new[2], aten.mul.Tensor(old[2], reset)))
    return aten.add.Tensor(aten.mul.Tensor(aten.sub.Tensor(state, candidate), update), candidate)


PREFERRED: Mapping[Any, Callable[..., Any]] = {
    aten.gru_cell.default: _gated,
    aten.lerp.Scalar: lambda start, end, weight: aten.add.Tensor(
        aten.mul.Tensor(start, 1 - weight), aten.mul.Tensor(end, weight)
    ),
    aten.lerp.Tensor: lambda start, end, weight: aten.add.Tensor(
        aten.mul.Tensor(start, aten.rsub.Scalar(weight, 1)), aten.mul.Tensor(end, weight)
    ),
    aten.max.dim: _extreme(aten.amax.default, aten.argmax.default),
    aten.min.dim: _extreme(aten.amin.default, aten.argmin.default),
    aten.var_mean.correction: _mean_beside(aten.var.correction),
    aten.std_mean.correction: _mean_beside(aten.std.correction),
}
"""Decompositions that are used instead of torch's, which choose between two formulas or end in operators below ATen."""


def open_composites(gm: fx.GraphModule) -> None:
    """Replace, in place, each call of an operator outside the vocabulary by its decomposition, where that is inside.

    gm: a captured graph whose values have symbolic sizes, so that no size becomes a number. Inserted nodes have the
        layer and the source line of the node that they replace.
    """
    known: dict[str, fx.GraphModule | None] = {}  # blocks that are alike call the same
    for node in [node for node in gm.graph.nodes if tensors_of(node.meta.get("val")) and decompositions(node.target)]:
        call = _described(node)
        if call not in known:
            known[call] = _traced(node)
        if (traced := known[call]) is not None:
            _splice(gm.graph, node, traced)
    gm.recompile()


def _described(node: fx.Node) -> str:
    """Return what the trace of a call depends on: operator, what its inputs are like, and which results are read."""
    numbers = {x: n for n, x in enumerate(node.all_input_nodes)}
    call = fx.map_arg((node.args, dict(node.kwargs)), lambda x: f"input {numbers[x]}")
    likes = [[_like(value) for value in pytree.tree_leaves(x.meta.get("val"))] for x in numbers]
    return repr((node.target, call, likes, _read(node)))


def _like(value: Any) -> Any:
    """Return all that a trace can know of a value; of a tensor with contents, or a sparse one, which one it is."""
    if not isinstance(value, torch.Tensor):
        return type(value), value
    if not is_fake(value) or value.layout != torch.strided:
        return torch.Tensor, id(value)
    return tuple(value.shape), value.stride(), value.dtype, value.device, value.requires_grad, value.is_inference()


def decompositions(target: Any) -> tuple[Callable[..., Any], ...]:
    """Return the ways in which torch opens an operator; none for the vocabulary, and where torch doesn't say how.

    What draws random numbers stays whole: opened, it would draw others.
    """
    if not is_operator(target) or has_own_rule(target):
        return ()
    if target.namespace == "gtp_fx" or torch.Tag.nondeterministic_seeded in target.tags:
        return ()
    if target in PREFERRED:
        return (PREFERRED[target],)
    own = (target.decompose,) if decomposes(target) else ()
    return own + tuple(table[target] for table in _tables() if target in table)


@functools.cache
def _tables() -> tuple[Mapping[Any, Callable[..., Any]], ...]:
    """Return torch's decompositions: those of torch.export first, since compilers prefer their results."""
    return decomposition_tables()


def _traced(node: fx.Node) -> fx.GraphModule | None:
    """Trace a call through its decomposition, down to the vocabulary.

    Return a graph with an input for each of `node.all_input_nodes`, or None where something else would be left.
    """
    inputs = node.all_input_nodes
    if any("val" not in x.meta for x in inputs) or not any(tensors_of(x.meta["val"]) for x in inputs):
        return None
    values = [x.meta["val"] for x in inputs]
    read = _read(node)
    for decompose in decompositions(node.target):

        def once(*given: Any, decompose: Callable[..., Any] = decompose) -> Any:
            """Call the decomposition with the inputs in their places; return the results that are read."""
            place = dict(zip(inputs, given, strict=True))
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda x: place[x])
            result = decompose(*args, **kwargs)
            if isinstance(result, torch.Tensor):
                return result
            return [item if n in read else None for n, item in enumerate(result)]

        if (graph := _down_to_vocabulary(once, values)) is not None:
            return graph
    return None


def _read(node: fx.Node) -> set[Any]:
    """Return which of a call's results are read, where it has several."""
    return {reader.args[1] for reader in node.users if reader.target is operator.getitem and reader.users}


def _down_to_vocabulary(function: Callable[..., Any], values: list[Any]) -> fx.GraphModule | None:
    """Trace a function, opening what it calls as well; None where something outside the vocabulary is left."""
    for _ in range(_DEPTH):
        try:
            graph = trace_functional(function, values)
        except Exception:
            return None  # torch's decomposition doesn't take these arguments
        if graph is None or any(n.op == "get_attr" for n in graph.graph.nodes):
            return None  # it holds for one batch size alone, or makes a constant of its own
        unknown = [n.target for n in graph.graph.nodes if n.op == "call_function" and not _known(n)]
        if not unknown:
            return graph
        ways = {target: decompositions(target) for target in unknown}
        if not all(ways.values()):
            return None
        further = {target: of_target[-1] for target, of_target in ways.items()}
        function = functools.partial(_interpret, graph, further)
    return None


def _known(node: fx.Node) -> bool:
    """Tell whether a node is in the vocabulary, or needs no rule: sizes, constants, what nothing reads."""
    if not is_operator(node.target) or find(node.target) is not None or not node.users:
        return True
    reads_tensors = any(tensors_of(x.meta.get("val")) for x in node.all_input_nodes)
    return node.target.namespace == "aten" and not (reads_tensors and tensors_of(node.meta.get("val")))


def _interpret(graph: fx.GraphModule, further: Mapping[Any, Callable[..., Any]], *given: Any) -> Any:
    """Run a traced decomposition with some of its operators decomposed as well."""

    class Opening(fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            return further.get(target, target)(*args, **kwargs)

    return Opening(graph).run(*given)


def _splice(graph: fx.Graph, node: fx.Node, traced: fx.GraphModule) -> None:
    """Put the nodes of a traced call in its place, with its origin; `getitem`s of a list read the items themselves."""
    origin = {key: node.meta[key] for key in META_KEYS if key in node.meta}
    copied: dict[fx.Node, fx.Node] = dict(
        zip(traced.graph.find_nodes(op="placeholder"), node.all_input_nodes, strict=True)
    )
    with graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "call_function":
                copied[inner] = graph.node_copy(inner, lambda x: copied[x])
                copied[inner].meta = {"val": inner.meta.get("val"), **origin}
    (output,) = traced.graph.find_nodes(op="output")
    result = fx.map_arg(output.args[0], lambda x: copied[x])
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:
        for reader in list(node.users):  # `getitem`s
            if reader.users:
                reader.replace_all_uses_with(result[reader.args[1]])
            graph.erase_node(reader)
    graph.erase_node(node)
    for unread in reversed([copied[inner] for inner in traced.graph.nodes if inner.op == "call_function"]):
        if not unread.users:
            graph.erase_node(unread)
