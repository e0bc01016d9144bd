"""Liveness: which tokens of each value anything depends on, found backwards from the outputs.

A head that reads only the CLS token needs one leading token of the last norm, hence of the last MLP, of the last
attention's output and of its queries; of keys and values it needs all. So liveness is a count of leading tokens: `ALL`,
or at most the prefix. That one distinction removes whole rows of work. (Under a pooled head, prefix tokens are dead
instead: a few rows among hundreds, whose removal would cost a copy of all others.)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from gtp_fx.analysis.marks import MARK
from gtp_fx.graph.nodes import is_input
from gtp_fx.types.axes import TensorType, token_axes, token_axis
from gtp_fx.types.infer import WholeTyping
from gtp_fx.types.rules.registry import RuleResult, TypeList

ALL = 1 << 60
"""Liveness of a value whose tokens are all needed; larger than any count of leading tokens."""


@dataclass(frozen=True)
class Liveness:
    """Counts of leading tokens, by node.

    needed: how many of the value's tokens its users read.
    computed: how many tokens the node can be narrowed to.
    """

    needed: dict[fx.Node, int]
    computed: dict[fx.Node, int]


def live_tokens(typing: WholeTyping, whole: frozenset[fx.Node] = frozenset()) -> Liveness:
    """Compute the liveness of every value.

    whole: nodes that are computed for all tokens, whatever is read of them.
    """
    needed: dict[fx.Node, int] = {}
    computed: dict[fx.Node, int] = {}
    for node in reversed(typing.graph.nodes):
        answer = typing.results.get(node)
        if answer is None:
            continue
        if node.target is operator.getitem:  # an item passes what it needs on to the whole result
            source = node.args[0]
            needed[source] = max(needed.get(source, 0), needed.get(node, 0))  # type: ignore[index,arg-type]
            continue
        wanted = needed.get(node, 0)
        computed[node] = wanted if node not in whole and _can_narrow(node, answer, wanted) else ALL
        for operand in node.all_input_nodes:
            needed[operand] = max(needed.get(operand, 0), _wanted_of(operand, answer, computed[node]))
    for node in typing.graph.nodes:
        if node.target is operator.getitem and node.args[0] in computed:
            computed[node] = computed[node.args[0]]  # type: ignore[index]
    return Liveness(needed, computed)


def whole_attention(graph: fx.Graph) -> frozenset[fx.Node]:
    """Return the attention nodes of marked blocks."""
    return frozenset(node for node in graph.nodes if MARK in node.meta and node.meta[MARK].role == "attention")


def follows(operand: fx.Node, answer: RuleResult) -> bool:
    """Tell whether the first n tokens of the output need no more than the first n tokens of this operand."""
    return answer.prefix_operands is None or operand in answer.prefix_operands


def _wanted_of(operand: fx.Node, answer: RuleResult, computed: int) -> int:
    """Return how many leading tokens of an operand the `computed` tokens of its reader need."""
    if computed != ALL and follows(operand, answer):
        return computed
    return answer.prefix_needed.get(operand, ALL)


def _can_narrow(node: fx.Node, answer: RuleResult, wanted: int) -> bool:
    """Tell whether the node can be computed for its `wanted` leading tokens alone."""
    if is_input(node) or node.op == "output" or answer.barrier or wanted == 0:
        return False
    if answer.prefix_operands is not None and not answer.prefix_operands:
        return False
    outputs = answer.output.items if isinstance(answer.output, TypeList) else (answer.output,)
    followed = [kind for operand, kind in answer.operands.items() if follows(operand, answer)]
    return all(_sliceable(kind, wanted) for kind in outputs if kind is not None) and all(
        _sliceable(kind, wanted) or not token_axes(kind) for kind in followed
    )


def _sliceable(kind: TensorType, wanted: int) -> bool:
    """Tell whether a type has one token axis, as a dimension of its own, whose prefix holds the wanted tokens."""
    axes = [axis for dim in kind if (axis := token_axis(dim))]
    return len(axes) == 1 and len(token_axes(kind)) == 1 and wanted <= axes[0].prefix
