"""Which operators run as one kernel: element-wise neighbours, as Inductor fuses them.

Between two products a value passes through norms, activations and residual adds of the same size; compiled, they read what
enters them and write what leaves them, once. So traffic is counted a group, not an operator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from gtp_fx.graph.operators import WITHOUT_COPY
from gtp_fx.plan.cost.formulas import find
from gtp_fx.types.axes import TensorType, whole_size
from gtp_fx.types.infer import Typing
from gtp_fx.types.rules.layout import is_view


@dataclass(frozen=True)
class Group:
    """Nodes that run as one kernel. reads: values that enter, by node and the type that they come in; writes: that leave."""

    nodes: tuple[fx.Node, ...]
    reads: tuple[tuple[fx.Node, TensorType], ...]
    writes: tuple[fx.Node, ...]


def fused_groups(typing: Typing) -> Iterator[Group]:
    """Every node that is neither a product nor a view, in groups; a node that nothing else fits is a group alone."""
    depth: dict[fx.Node, int] = {}
    leader: dict[fx.Node, fx.Node] = {}
    members: dict[fx.Node, list[fx.Node]] = {}
    for node in typing.graph.nodes:
        sources = [_memory_of(n) for n in node.all_input_nodes]
        # How many products lie before: a residual add and the one before it are apart, though the one reads the other.
        depth[node] = max((depth.get(n, 0) + bool(_is_product(n)) for n in sources), default=0)
        if not _is_fusable(node, typing):
            continue
        leader[node] = node
        members[node] = [node]
        for source in sources:
            if source in leader and _fuses(source, node, depth, typing) and leader[source] is not leader[node]:
                into, gone = leader[source], leader[node]
                members[into] += members[gone]
                for member in members.pop(gone):
                    leader[member] = into
    for nodes in members.values():
        yield _group(nodes, typing)


def _fuses(source: fx.Node, node: fx.Node, depth: dict[fx.Node, int], typing: Typing) -> bool:
    """Also across a place where tokens may leave: none need, and what it costs where some do is the site's."""
    return depth[source] == depth[node] and _elements(source, typing) == _elements(node, typing)


def _group(nodes: list[fx.Node], typing: Typing) -> Group:
    inside = set(nodes)
    reads: dict[fx.Node, tuple[fx.Node, TensorType]] = {}
    for node in nodes:
        wanted = typing.answers[node].operands
        for operand in node.all_input_nodes:
            memory = _memory_of(operand)
            if memory not in inside and typing.is_tensor(operand):
                reads.setdefault(memory, (operand, wanted.get(operand, typing.type(operand))))
    writes = tuple(node for node in nodes if any(user not in inside for user in node.users))
    return Group(tuple(nodes), tuple(reads.values()), writes)


def _memory_of(node: fx.Node) -> fx.Node:
    """The node that wrote the memory which `node` shows."""
    while (is_view(node) or node.target in WITHOUT_COPY) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _is_product(node: fx.Node) -> bool:
    return node.op == "call_function" and find(node.target) is not None


def _is_fusable(node: fx.Node, typing: Typing) -> bool:
    if node.op != "call_function" or _is_product(node) or not typing.is_tensor(node):
        return False
    return not is_view(node) and node.target not in WITHOUT_COPY


def _elements(node: fx.Node, typing: Typing) -> int:
    return math.prod(whole_size(dim) for dim in typing.type(node))
