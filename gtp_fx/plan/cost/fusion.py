"""Which operators run as one kernel: element-wise neighbours, as Inductor fuses them.

Between two products a value passes through norms, activations and residual adds of the same size. Compiled, these run
as one kernel that reads its inputs and writes its outputs once. So memory traffic is counted per group, not per
operator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from gtp_fx.graph.operators import WITHOUT_COPY
from gtp_fx.plan.cost.formulas import formula_of
from gtp_fx.types.axes import TensorType, whole_size
from gtp_fx.types.infer import Typing
from gtp_fx.types.rules.views import is_view


@dataclass(frozen=True)
class Group:
    """Nodes that run as one kernel.

    nodes: its members, in no particular order.
    reads: the values it reads, each with the type it is read in.
    writes: the members whose values are used outside it.
    """

    nodes: tuple[fx.Node, ...]
    reads: tuple[tuple[fx.Node, TensorType], ...]
    writes: tuple[fx.Node, ...]


def fused_groups(typing: Typing) -> Iterator[Group]:
    """Yield the groups of a graph; every node that is neither a product nor a view is in exactly one."""
    depth: dict[fx.Node, int] = {}
    leader: dict[fx.Node, fx.Node] = {}
    members: dict[fx.Node, list[fx.Node]] = {}
    for node in typing.graph.nodes:
        sources = [_memory_of(n) for n in node.all_input_nodes]
        # depth counts the products before a node. Two residual adds with a product between them run as separate
        # kernels, though one reads the other.
        depth[node] = max((depth.get(n, 0) + bool(_is_product(n)) for n in sources), default=0)
        if not _is_fusable(node, typing):
            continue
        # Begin a group with the node, and merge it into the group of each operand that it fuses with.
        leader[node] = node
        members[node] = [node]
        for source in sources:
            if source in leader and _fuses(source, node, depth, typing) and leader[source] is not leader[node]:
                into, merged = leader[source], leader[node]
                members[into] += members[merged]
                for member in members.pop(merged):
                    leader[member] = into
    for nodes in members.values():
        yield _group(nodes, typing)


def _fuses(source: fx.Node, node: fx.Node, depth: dict[fx.Node, int], typing: Typing) -> bool:
    """Return whether a node fuses with an operand: equally many products before both, and equally many elements.

    Sizes are those with every token in place, so groups reach across sites: at a site that removes nothing they do run
    as one kernel, and where tokens are removed, the site's own work covers the difference.
    """
    return depth[source] == depth[node] and _elements(source, typing) == _elements(node, typing)


def _group(nodes: list[fx.Node], typing: Typing) -> Group:
    """Make the group of some nodes, counting each piece of memory that it reads once."""
    inside = set(nodes)
    reads: dict[fx.Node, tuple[fx.Node, TensorType]] = {}
    for node in nodes:
        wanted = typing.results[node].operands
        for operand in node.all_input_nodes:
            memory = _memory_of(operand)
            if memory not in inside and typing.is_tensor(operand):
                reads.setdefault(memory, (operand, wanted.get(operand, typing.type(operand))))
    writes = tuple(node for node in nodes if any(user not in inside for user in node.users))
    return Group(tuple(nodes), tuple(reads.values()), writes)


def _memory_of(node: fx.Node) -> fx.Node:
    """Return the node that wrote the memory which `node` is a view of."""
    while (is_view(node) or node.target in WITHOUT_COPY) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _is_product(node: fx.Node) -> bool:
    return formula_of(node) is not None


def _is_fusable(node: fx.Node, typing: Typing) -> bool:
    if node.op != "call_function" or _is_product(node) or not typing.is_tensor(node):
        return False
    return not is_view(node) and node.target not in WITHOUT_COPY


def _elements(node: fx.Node, typing: Typing) -> int:
    return math.prod(whole_size(dim) for dim in typing.type(node))
