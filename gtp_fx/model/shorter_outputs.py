"""The refusal of output="reduced" where nothing that a model returns can have fewer tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import fx
from torch.utils import _pytree as pytree

from gtp_fx.analysis.returned_tokens import ReturnedTokens, names_of_outputs
from gtp_fx.errors import Refusal, UnsupportedModelError
from gtp_fx.graph.nodes import tensors_of
from gtp_fx.plan.plan import Plan


def must_be_shorter(graph: fx.Graph, returned: Sequence[ReturnedTokens], plan: Plan) -> None:
    """Raise UnsupportedModelError, with a reason for each output, where none has fewer tokens than the original's.

    Where the plan removes nothing, it suffices that one could have.

    graph: the rewritten graph. returned: its outputs that run over tokens.
    """
    nothing_leaves = not plan.removed and not plan.skipping
    if any(nothing_leaves or kept.axis.domain.level for kept in returned):
        return
    raise UnsupportedModelError(
        'output="reduced": nothing that this model returns can have fewer tokens (output="full" works)',
        tuple(_reasons(graph, {kept.number for kept in returned}, plan)),
    )


def _reasons(graph: fx.Graph, of_tokens: set[int], plan: Plan) -> Iterator[Refusal]:
    """Yield why each output is as it was. of_tokens: the numbers of those that run over tokens."""
    for number, (leaf, name) in enumerate(
        zip(pytree.tree_leaves(graph.output_node().args[0]), names_of_outputs(graph), strict=True)
    ):
        for value in tensors_of(leaf.meta.get("val")) if isinstance(leaf, fx.Node) else ():
            shape = ", ".join(["*", *map(str, value.shape[1:])])
            if plan.strategy.restores_tokens:
                yield Refusal("", name, f"strategy {plan.strategy.name!r} puts every token back before it")
            elif number not in of_tokens:
                yield Refusal("", name, f"it is [{shape}], which is no row of each image's tokens")
            elif not plan.removed:
                yield Refusal("", name, "tokens only skip branches in this model, and stay in their stream")
            else:
                yield Refusal("", name, "an operator before it needs every token, so they are put back there")
