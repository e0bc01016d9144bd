"""What a node of a block does where the block runs for some of its windows alone: a `Step`.

`steps_of_tokens` and `steps_by_window` find them, `window_walk` walks a block, and `gtp_fx.passes.reduce.rest_windows`
carries them out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph.operators import PADDINGS, PERMUTATIONS, REARRANGED, VIEWS

MOVES = (*VIEWS, *PERMUTATIONS, *REARRANGED, *PADDINGS, aten.roll.default, aten.slice.Tensor, aten.flatten.using_ints)
"""What does nothing but rearrange tokens, where both its operand and its result are all of them."""

PAD, CROP = "pad", "crop"
"""Targets of steps: tokens of the windows that are awake, to these windows with their padding, and back."""


@dataclass(frozen=True)
class Sampled:
    """An operand that is read at the middles of cells along a dimension, which is counted from the end.

    side: the window's side that the dimension is; None where it is all places of a window.
    """

    operand: fx.Node
    dim: int
    side: int | None = None


@dataclass(frozen=True)
class Step:
    """What one node of the block does for fewer windows.

    node: the node.
    target: the operator; None where the value is that of its operand, in another arrangement.
    args, kwargs: its arguments, in which nodes of the block stand for what their steps return.
    taken: of the operands from outside, those with an entry for each window, and in which dimension.
    reshaped: operands that come in another shape first, with that shape.
    sampled: operands that are read at cells' middles, where the windows rest.
    """

    node: fx.Node
    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    taken: tuple[tuple[fx.Node, int], ...] = ()
    reshaped: tuple[tuple[fx.Node, tuple[int, ...]], ...] = ()
    sampled: tuple[Sampled, ...] = ()

    def copied(self, at: Mapping[fx.Node, fx.Node]) -> Step:
        """Return this step in a copy of the graph. at: each node's copy."""
        return replace(
            self,
            node=at[self.node],
            args=fx.map_arg(self.args, at.__getitem__),
            kwargs=fx.map_arg(dict(self.kwargs), at.__getitem__),
            taken=tuple((at[node], dim) for node, dim in self.taken),
            reshaped=tuple((at[node], shape) for node, shape in self.reshaped),
            sampled=tuple(replace(one, operand=at[one.operand]) for one in self.sampled),
        )
