"""Whose tokens a value holds: where the batch is taken apart or joined, other images follow.

Each image keeps tokens of its own, so what says which ones has the batch as a dimension too. An operator that takes a
batch apart (`x[:B]`, `chunk`, a mean over views), joins two, or puts one into another order, has to have every token in
place: they are recovered before it. What follows has other images, whose tokens are a stream of their own: the grid
that they run over gets another name, although its places pair with the first one's. So no grid has two batches, and
attention of one image's tokens to another's isn't taken for self-attention.
"""

from __future__ import annotations

from dataclasses import replace

from gtp_fx.types.axes import Factor, TensorType, TokenAxis, images_in, token_axes
from gtp_fx.types.grids import Grid, GridAxis
from gtp_fx.types.rules.registry import Call, NoRule, RuleResult, TypeList

_REASON = "it takes a batch apart, joins or reorders it, and each image keeps tokens of its own"


def separate_images(answer: RuleResult, call: Call) -> RuleResult:
    """Return a rule's answer with grids of other images where the operator's output has other images.

    Raises NoRule where tokens have been removed from what the operator reads.
    """
    if answer.output is None or answer.barrier:
        return answer
    listed = isinstance(answer.output, TypeList)
    outputs = answer.output.items if isinstance(answer.output, TypeList) else (answer.output,)
    own = [kind for node in call.node.all_input_nodes if isinstance(kind := call.types.get(node), tuple)]
    before: dict[Grid, set[int]] = {}
    for kind in own:
        for grid in _grids(kind):
            before.setdefault(grid, set()).add(images_in(kind))
    named = []
    for position, output in enumerate(outputs):
        # A grid that is born here has no images yet to be told from others.
        after = [grid for grid in _grids(output) if grid in before]
        if after and (answer.other_images or any(images_in(output) not in before[grid] for grid in after)):
            if any(axis.domain.level for kind in own for axis in token_axes(kind)):
                raise NoRule(_REASON)
            output = _of_other_images(output, f"{call.node.name}_{position}" if listed else call.node.name)
        named.append(output)
    return replace(answer, output=TypeList(tuple(named)) if listed else named[0])


def _grids(kind: TensorType) -> set[Grid]:
    """Return the grids that a type runs over."""
    return {_grid(f) for dim in kind for f in dim if isinstance(f, GridAxis | TokenAxis)}


def _grid(factor: GridAxis | TokenAxis) -> Grid:
    return factor.grid if isinstance(factor, GridAxis) else factor.domain.grid


def _of_other_images(kind: TensorType, where: str) -> TensorType:
    """Return the type over the same grids of other images."""

    def change(factor: Factor) -> Factor:
        if isinstance(factor, GridAxis):
            return replace(factor, grid=factor.grid.of_other_images(where))
        if isinstance(factor, TokenAxis):
            return replace(factor, domain=replace(factor.domain, grid=factor.domain.grid.of_other_images(where)))
        return factor

    return tuple(tuple(map(change, dim)) for dim in kind)
