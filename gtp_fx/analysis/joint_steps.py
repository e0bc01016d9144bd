"""What of a block works on each token alone: there windows that are awake and the cells of the others run as one.

    awake [W, n, C] ─┐               ┌─ [W, n, 3C] ─ attention ─┐
                     ├─ norm ─ qkv ──┤                          ├─ projection ─ add ─ norm ─ MLP ─ add
    cells [R, G, C] ─┘               └─ [R, G, 3C] ─ attention ─┘

Few rows use a processor badly and read as many weights as many do, so one product of all of them takes less time than
two; and it is one operator to launch and to compile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.analysis.window_forms import Forms, Run
from gtp_fx.analysis.window_steps import Step
from gtp_fx.graph.operators import FEATURE_NORMS, VIEWS
from gtp_fx.graph.symbols import shape_of
from gtp_fx.types.axes import is_plain, whole_size


@dataclass(frozen=True)
class JointSteps:
    """The part of a block that runs on the rows of windows that are awake and of cells at once, [rows, features].

    nodes: those that do.
    places: of each value whose tokens can be rows in this order, the sizes of a window's places; None where it is a
        stream's tokens, of which a window that is awake has no padding.
    """

    nodes: frozenset[fx.Node]
    places: Mapping[fx.Node, tuple[int, ...] | None]

    def copied(self, at: Mapping[fx.Node, fx.Node]) -> JointSteps:
        """Return this in a copy of the graph. at: each node's copy."""
        return JointSteps(frozenset(at[node] for node in self.nodes), {at[n]: of for n, of in self.places.items()})


def joint_steps(stream: fx.Node, steps: Sequence[Step], coarse: Sequence[Step], forms: Forms) -> JointSteps:
    """Return which nodes of a block can run on all rows at once, and lead to a projection or follow one.

    steps: what they do for windows that are awake. coarse: for cells. forms: of all of the block's values.
    """
    values = (stream, *(step.node for step in steps))
    places = {node: _places(node, forms) for node in values if _in_rows(node, forms)}
    alone = [a.node for a, b in zip(steps, coarse, strict=True) if _is_alone(a, b, forms, places)]
    leads: set[fx.Node] = set()
    for node in reversed(alone):
        if node.target is aten.linear.default or not leads.isdisjoint(node.users):
            leads.add(node)
    joint: set[fx.Node] = set()
    for node in alone:
        if node in leads or not joint.isdisjoint(node.all_input_nodes):
            joint.add(node)
    return JointSteps(frozenset(joint), places)


def _in_rows(node: fx.Node, forms: Forms) -> bool:
    """Return whether a value's dimensions are windows, their places row by row, then features, the last one."""
    form, kind = forms.of[node], forms.typing.type(node)
    if not isinstance(form, Run):
        return True  # its step brings it into rows
    return form.at == 0 and form.shared == 1 and len(kind) >= 2 and is_plain(kind[-1]) and forms.in_rows(kind)


def _places(node: fx.Node, forms: Forms) -> tuple[int, ...] | None:
    """Return the sizes of the places of a window in a value that is in rows; None for a stream's tokens."""
    form, kind = forms.of[node], forms.typing.type(node)
    if isinstance(form, Run):
        return tuple(whole_size(dim) for dim in kind[form.length : -1])
    return None if form is None else (whole_size(forms.rows[1]),)


def _is_alone(step: Step, coarse: Step, forms: Forms, places: Mapping[fx.Node, object]) -> bool:
    """Return whether a node does the same for every row."""
    node, own = step.node, forms.own(step.node)
    if node not in places or any(operand not in places for operand in own) or coarse.target != step.target:
        return False
    if step.target is None:
        return True
    if step.target in VIEWS:  # of tokens, where each keeps its features
        features = {whole_size(forms.typing.type(value)[-1]) for value in (node, *own)}
        return len(own) == 1 and len(features) == 1
    if step.taken or coarse.sampled or step.reshaped != coarse.reshaped:
        return False
    shapes = dict(step.reshaped)
    tables = [n for n in node.all_input_nodes if n not in own and forms.typing.is_tensor(n)]
    if node.target is aten.linear.default:
        return own == [node.args[0]]
    if node.target in FEATURE_NORMS:
        return own == [node.args[0]] and len(node.args[1]) == 1  # type: ignore[arg-type]
    of_features = all(len(shapes.get(table, shape_of(table))) <= 1 for table in tables)
    return of_features and torch.Tag.pointwise in getattr(node.target, "tags", ())
