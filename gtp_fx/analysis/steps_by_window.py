"""Steps of values by window: each keeps its form, with fewer windows.

A table that has an entry for each window is taken for those that are awake.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.analysis.window_forms import Forms, NoRest, Run
from gtp_fx.analysis.window_steps import Step
from gtp_fx.graph.nodes import operator_name
from gtp_fx.graph.operators import ATTENTION, FEATURE_NORMS, NAMED_DIMENSIONS, PERMUTATIONS, REARRANGED, VIEWS
from gtp_fx.graph.symbols import is_symbolic, shape_of


def step_by_window(node: fx.Node, forms: Forms) -> Step:
    """Return what a node does whose result is by window, and note its form. Raises NoRest."""
    run, own = forms.run(node), forms.own(node)
    forms.of[node] = run
    if node.target in VIEWS:
        return _view(node, own[0], run, forms)
    seen = [forms.seen(n, node) for n in own]
    rank = len(shape_of(node))
    if node.target in PERMUTATIONS:
        return Step(node, aten.permute.default, (own[0], _permuted(node, seen[0], rank)))
    if node.target in REARRANGED:
        return Step(node, node.target, node.args, node.kwargs)
    if node.target is aten.unsqueeze.default:
        new: Any = node.args[1]
        return Step(node, node.target, (own[0], run.dim(new % rank)))
    if node.target in NAMED_DIMENSIONS and len(own) == 1 and node.args[0] is own[0]:
        return Step(node, node.target, _renamed(node, seen[0], len(shape_of(own[0]))), node.kwargs)
    if any(form != run or len(shape_of(n)) != rank for form, n in zip(seen, own, strict=True)):
        raise NoRest(f"{operator_name(node)} inside it meets windows in two arrangements")
    if node.target is aten.expand.default:
        sizes = [-1 if a == b else b for a, b in zip(shape_of(own[0]), shape_of(node), strict=True)]
        sizes[run.at : run.at + run.length] = [-1]
        return Step(node, node.target, (own[0], sizes))
    if node.target is aten.einsum.default:
        return _einsum(node, own, run)
    return _within_windows(node, own, run, forms)


def _view(node: fx.Node, operand: fx.Node, run: Run, forms: Forms) -> Step:
    """Return the step of a view of what is by window already, or of rows."""
    form, kind, shape = forms.of[operand], forms.typing.type(operand), shape_of(node)
    out_of = isinstance(form, Run)
    in_order = out_of or (form == forms.of_rows and run.at == 0 and forms.in_rows(kind))
    if not in_order or (isinstance(form, Run) and shape_of(operand)[: form.at] != shape[: run.at]):
        raise NoRest("what leads into its windows isn't a view")
    sizes = [*shape[: run.at], -1, *shape[run.at + run.length :]]
    if any(is_symbolic(size) for size in sizes if size > 0):
        raise NoRest("images stand beside windows, apart from them")
    return Step(node, aten.reshape.default, (operand, sizes))


def _permuted(node: fx.Node, form: Run, rank: int) -> list[int]:
    """Return the order of dimensions of a permutation where the windows are one of them."""
    order, named = list(range(rank)), node.args[1:3]
    if node.target is aten.transpose.int:
        a, b = (int(dim) % rank for dim in named)  # type: ignore[arg-type]
        order[a], order[b] = order[b], order[a]
    else:
        order = [int(dim) % rank for dim in named[0]]  # type: ignore[union-attr, arg-type]
    inside = range(form.at, form.at + form.length)
    places = [order.index(dim) for dim in inside]
    if places != list(range(places[0], places[0] + form.length)):
        raise NoRest("windows are permuted among each other")
    return [form.at if dim == form.at else form.dim(dim) for dim in order if dim == form.at or dim not in inside]


def _renamed(node: fx.Node, form: Run, rank: int) -> tuple[Any, ...]:
    """Return the arguments of an operator that names dimensions, where the windows are one of them."""
    at = NAMED_DIMENSIONS[node.target]
    if at >= len(node.args) or node.args[at] is None:
        raise NoRest(f"{operator_name(node)} inside it works across windows")
    named: Any = node.args[at]
    dims = form.dim(named % rank) if isinstance(named, int) else [form.dim(dim % rank) for dim in named]
    return (*node.args[:at], dims, *node.args[at + 1 :])


def _einsum(node: fx.Node, own: list[fx.Node], run: Run) -> Step:
    """Return the step of an einsum in which one letter is the windows of the result and of every operand by window."""
    equation, operands = node.args
    reads, _, result = str(equation).replace(" ", "").partition("->")
    letters = dict(zip(operands, reads.split(","), strict=True))  # type: ignore[arg-type]
    if "." in reads or run.length > 1 or not result:
        raise NoRest("aten.einsum.default inside it isn't known to work within each window")
    windows = result[run.at]
    if any(letters[n].find(windows) != run.at if n in own else windows in letters[n] for n in letters):
        raise NoRest("aten.einsum.default inside it works across windows")
    return Step(node, node.target, node.args, node.kwargs)


def _within_windows(node: fx.Node, own: list[fx.Node], run: Run, forms: Forms) -> Step:
    """Return the step of what works on features alone, attends or is pointwise, whose operands lie as its result."""
    behind = len(shape_of(node)) - run.at - run.length  # dimensions after the windows
    of_features = own == [node.args[0]] and (
        (node.target is aten.linear.default and behind > 0)
        or (node.target in FEATURE_NORMS and len(node.args[1]) <= behind)  # type: ignore[arg-type]
    )
    if of_features:  # its parameters are of features alone
        return Step(node, node.target, node.args, node.kwargs)
    attends = node.target in ATTENTION and behind >= 2 and set(own) >= set(node.args[:3])
    if not attends and torch.Tag.pointwise not in getattr(node.target, "tags", ()):
        raise NoRest(f"{operator_name(node)} inside it isn't known to work within each window")
    return _with_tables(node, [n for n in node.all_input_nodes if n not in own and forms.typing.is_tensor(n)], run)


def _with_tables(node: fx.Node, tables: list[fx.Node], run: Run) -> Step:
    """Return the step of an operator that also reads tables, each of which is by window or the same for all windows."""
    shape = shape_of(node)
    taken, reshaped = [], []
    for table in tables:
        sizes = list(shape_of(table))
        first = len(shape) - len(sizes)  # operands are aligned at the end
        there = [d - first for d in range(run.at, run.at + run.length) if d >= first]
        if all(sizes[d] == 1 for d in there):
            if run.length > 1 and len(there) > 1:
                reshaped.append((table, (*sizes[: there[0]], 1, *sizes[there[-1] + 1 :])))
            continue
        if run.length > 1 or run.shared > 1 or sizes[there[0]] != shape[run.at]:
            raise NoRest(
                f"{operator_name(node)} inside it reads a table by window that fewer windows can't be taken from"
            )
        taken.append((table, there[0]))
    return Step(node, node.target, node.args, node.kwargs, tuple(taken), tuple(reshaped))
