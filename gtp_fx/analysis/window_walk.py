"""The walk through a block whose windows can rest: its nodes in graph order, and what each does for fewer windows."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.analysis.steps_by_window import step_by_window
from gtp_fx.analysis.steps_of_tokens import step_of_padded, step_of_tokens
from gtp_fx.analysis.window_forms import Forms, NoRest
from gtp_fx.analysis.window_steps import MOVES, Step
from gtp_fx.graph.nodes import ancestors, operator_name
from gtp_fx.types.infer import WholeTyping

_MADE = (aten.new_zeros.default, aten.new_ones.default, aten.new_full.default)
"""New tensors, whose numbers don't depend on the one that gives dtype and device: masks are built with them."""


def last_add(result: fx.Node) -> fx.Node:
    """Return the add of the stream that a branch's result goes into."""
    node = result
    while node.target is not aten.add.Tensor or node is result:
        if len(node.users) != 1:
            raise NoRest("what its last branch makes isn't simply added to the stream")
        node = next(iter(node.users))
        if node.target is not aten.add.Tensor and node.target not in MOVES:
            raise NoRest("what its last branch makes isn't simply added to the stream")
    return node


def nodes_between(stream: fx.Node, result: fx.Node, typing: WholeTyping) -> list[fx.Node]:
    """Return the tensors that lead from the stream to the result, in graph order, `result` among them.

    What depends on their sizes, dtype or device alone, as a mask for each window does, is not among them.
    """
    before = ancestors(result) | {result}
    found: dict[fx.Node, None] = {}
    for node in stream.graph.nodes:
        reads = node in before and typing.is_tensor(node) and node.target not in _MADE
        if reads and any(n is stream or n in found for n in node.all_input_nodes):
            found[node] = None
    return list(found)


def read_outside(nodes: list[fx.Node], dtype: torch.dtype) -> tuple[list[fx.Node], list[fx.Node]]:
    """Return what reads a block's inside but not its numbers: nodes that read sizes, and those that make a new tensor.

    nodes: the block's, its result last.
    dtype: the stream's, which new tensors have.

    Raises NoRest where something else is read.
    """
    inside = set(nodes)
    sizes, made = [], []
    for node in nodes[:-1]:
        for user in node.users:
            if user.target is aten.sym_size.int:
                sizes.append(user)
            elif user.target in _MADE and user.meta["val"].dtype == dtype:
                made.append(user)
            elif user not in inside:
                raise NoRest(f"{operator_name(node)} inside it is read elsewhere")
    return sizes, made


def steps_of(nodes: list[fx.Node], stream: fx.Node, forms: Forms) -> tuple[Step, ...]:
    """Return what a block's nodes do for fewer windows, and note their forms.

    nodes: in graph order, the block's result last.

    Raises NoRest.
    """
    if not forms.is_tokens(stream):
        raise NoRest("its stream isn't laid out as tokens with features last, or holds padding")
    forms.of[stream] = None
    steps = tuple(_step(node, forms) for node in nodes)
    if forms.of[nodes[-1]] is not None:
        raise NoRest("its end isn't laid out as its stream is")
    return steps


def _step(node: fx.Node, forms: Forms) -> Step:
    answer = forms.typing.results.get(node)
    if answer is None or answer.barrier:
        raise NoRest(f"{operator_name(node)} inside it isn't understood")
    if forms.is_tokens(node):
        step = step_of_tokens(node, forms)
    else:
        step = step_of_padded(node, forms) if forms.is_padded(node) else step_by_window(node, forms)
    inner = [n for n in node.all_input_nodes if not forms.typing.is_tensor(n)]
    if step.target is not None and any(n in inner for n in _nodes_in(step.args)):
        raise NoRest(f"{operator_name(node)} inside it has a size that follows the batch")
    return step


def _nodes_in(arguments: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(arguments, found.append)
    return found
