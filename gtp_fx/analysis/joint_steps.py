"""What of a block works on each token alone: there windows that are awake and the cells of the others run as one.

    awake [W, n, C] ─┐               ┌─ [W, n, 3C] ─ attention ─┐
                     ├─ norm ─ qkv ──┤                          ├─ projection ─ add ─ norm ─ MLP ─ add
    cells [R, G, C] ─┘               └─ [R, G, 3C] ─ attention ─┘

Few rows use a processor badly and read as many weights as many do, so one product of all of them takes less time than
two; and it is one operator to launch and to compile.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.analysis.window_forms import Forms, Run
from gtp_fx.analysis.window_steps import CROP, PAD, Step


def joint_steps(steps: Sequence[Step], forms: Forms) -> frozenset[fx.Node]:
    """Return which nodes of a block run on all rows at once, [rows, features]: they lead to a product or follow one.

    steps: what they do for windows that are awake. forms: of all of the block's values.
    """
    alone = [step.node for step in steps if _is_alone(step, forms)]
    leads: set[fx.Node] = set()
    for node in reversed(alone):
        if node.target is aten.linear.default or not leads.isdisjoint(node.users):
            leads.add(node)
    joint: set[fx.Node] = set()
    for node in alone:
        if node in leads or not joint.isdisjoint(node.all_input_nodes):
            joint.add(node)
    return frozenset(joint)


def _is_alone(step: Step, forms: Forms) -> bool:
    """Return whether a node does the same for every row.

    A step of tokens, or of padded windows, is token-wise wherever it doesn't pad or crop them, and names features from
    the end (`steps_of_tokens`).
    """
    values = (step.node, *forms.own(step.node))
    return step.target not in (PAD, CROP) and not any(isinstance(forms.of[value], Run) for value in values)
