"""Where a graph is cut into sections: between the parts of its blocks, where little but the stream is alive.

At such a place few values pass from one side to the other, and nearly nothing is lost that a compiler could have fused
across it. The cuts depend on the graph's form alone, so blocks of one form are cut alike.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.ops import gtp_fx  # type: ignore[import-not-found]

from gtp_fx.graph.operators import VIEWS
from gtp_fx.graph.torch_internals import has_hint, is_higher_order, is_operator
from gtp_fx.model.sections.values import leaves, lies_in_order, value_of
from gtp_fx.strategies import group_operator as _registers_group  # noqa: F401

OUTSIDE = ("placeholder", "get_attr", "output")
"""Kinds of nodes that belong to no section."""

_OF_A_SITE = (operator.getitem, gtp_fx.group.default)
"""A decision which tokens leave, and its results. What is done with the stream then is compiled: unfused, it would take
as long as the decision."""


def can_be_cut(graph: fx.Graph) -> bool:
    """Return whether a graph can be run in sections.

    It can't where a node calls a module or another graph, or changes a setting (autocast) for those after it. Nor where
    a size depends on the data.
    """
    for node in graph.nodes:
        if node.op == "call_module" or (node.op != "output" and value_of(node) is None):
            return False
        values = leaves(value_of(node))
        if not all(map(has_hint, _sizes(values))):
            return False
        if node.op == "call_function" and is_higher_order(node.target):
            return False
        if node.op == "get_attr" and not isinstance(value_of(node), Tensor):
            return False
    return True


def cut(graph: fx.Graph) -> list[list[fx.Node]]:
    """Return the graph's calls, in order, in sections.

    A cut lies where fewer values are alive than at the places before and after. A site's own operators are a section.
    So are views before a cut: they differ with what reads them, and what stands before them doesn't.
    """
    nodes = _decisions_first([node for node in graph.nodes if node.op not in OUTSIDE])
    alive = _alive_after(nodes)
    # Runs of places with equally many values: a cut lies at the end of one between two with more.
    runs: list[tuple[int, int]] = []
    for i, count in enumerate(alive[:-1]):
        if count is None:
            continue
        if runs and runs[-1][1] == count:
            runs[-1] = (i, count)
        else:
            runs.append((i, count))
    cuts = {
        i + 1
        for (_, more), (i, count), (_, again) in zip(runs, runs[1:], runs[2:], strict=False)
        if more > count < again
    }
    cuts |= {_before_views(nodes, place) for place in cuts}
    for start, end in sites(nodes):
        cuts = {place for place in cuts if not start < place < end} | {start, end}
    cuts -= {i + 1 for i, count in enumerate(alive) if count is None}
    ends = [*sorted(cuts - {0, len(nodes)}), len(nodes)]
    return [nodes[start:end] for start, end in zip([0, *ends], ends, strict=False) if start < end]


def _before_views(nodes: Sequence[fx.Node], place: int) -> int:
    """Return the place before the views that end at `place`; they take no time of their own."""
    while place and is_free_view(nodes[place - 1]):
        place -= 1
    return place


def is_free_view(node: fx.Node) -> bool:
    """Return whether a node's value is its only operand's memory, differently arranged."""
    sources = node.all_input_nodes
    if len(sources) != 1 or not isinstance(value_of(sources[0]), Tensor):
        return False
    if node.target in VIEWS:
        return lies_in_order(value_of(sources[0]))
    return is_operator(node.target) and node.target.is_view


def sites(nodes: Sequence[fx.Node]) -> list[tuple[int, int]]:
    """Return where the operators of each site begin and end, as places in `nodes`.

    They are those of a strategy's `group`: some thirty small ones, which take longer to compile than all of a block.
    And what is made of decisions alone, such as the places of the kept tokens on the grid: only some sites have it, and
    what follows them is alike.
    """
    found, place, decided = [], 0, set[fx.Node]()
    while place < len(nodes):
        if nodes[place].target is gtp_fx.group.default:
            start = place
            while place < len(nodes) and (nodes[place].target in _OF_A_SITE or _reads_only(nodes[place], decided)):
                decided.add(nodes[place])
                place += 1
            found.append((start, place))
        place += 1
    return found


def _decisions_first(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Return the nodes in an order in which what is made of decisions alone stands behind the last of these."""
    found: list[fx.Node] = []
    decided: set[fx.Node] = set()
    end = 0  # where the last site's operators end
    for node in nodes:
        if node.target is gtp_fx.group.default:
            found.append(node)
            decided.add(node)
            end = len(found)
        elif _reads_only(node, decided):
            found.insert(end, node)
            decided.add(node)
            end += 1
        else:
            found.append(node)
    return found


def _reads_only(node: fx.Node, decided: set[fx.Node]) -> bool:
    """Return whether a node reads values, and no others than decisions."""
    return bool(node.all_input_nodes) and decided.issuperset(node.all_input_nodes)


def _alive_after(nodes: Sequence[fx.Node]) -> list[int | None]:
    """Return how many values are alive after each node; None where one of them can't pass from section to section."""
    place = {node: i for i, node in enumerate(nodes)}
    starts, ends, barred = [0] * (len(nodes) + 1), [0] * (len(nodes) + 1), [0] * (len(nodes) + 1)
    for node, i in place.items():
        last = max((place.get(user, len(nodes)) for user in node.users), default=i)
        starts[i] += 1
        ends[last] += 1
        if not _can_pass(value_of(node)):
            barred[i] += 1
            barred[last] -= 1
    alive, within, found = 0, 0, []
    for i in range(len(nodes)):
        alive += starts[i] - ends[i]
        within += barred[i]
        found.append(None if within else alive)
    return found


def _can_pass(value: Any) -> bool:
    """Return whether a value is an integer, or a tensor of which sizes and strides tell how it lies in memory."""
    if isinstance(value, Tensor):
        return value.layout is torch.strided and not value.is_conj() and not value.is_neg()
    return isinstance(value, int | torch.SymInt)


def _sizes(values: Sequence[Any]) -> list[Any]:
    """Return the integers among some values, and the sizes and strides of their tensors."""
    tensors = [value for value in values if isinstance(value, Tensor) and value.layout is torch.strided]
    return [value for value in values if isinstance(value, torch.SymInt)] + [
        size for tensor in tensors for size in (*tensor.shape, *tensor.stride())
    ]
