"""State of the walk in which operators become kernels, and helpers that several of its steps share."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph import edit
from gtp_fx.kernels.available import Kernels
from gtp_fx.kernels.stock_attention import StockAttention

_MOST_SIDES = 3
"""Most sides of a grid that the kernels take."""


@dataclass
class Lowering:
    """State of the walk.

    graph: the graph that is rewritten.
    kernels: the Triton kernels.
    stock: torch's own choice of attention kernels on the device; None where it isn't known.
    scale_form: how attention gets token scales, `Target.scale_form`.
    instead: new nodes that have replaced others.
    maps: by the node of the remaining tokens' places on the grid, the map that `select` returned and the number of the
        grid's cells.
    """

    graph: fx.Graph
    kernels: Kernels
    stock: StockAttention | None = None
    scale_form: str = "auto"
    instead: list[fx.Node] = field(default_factory=list)
    maps: dict[fx.Node, tuple[fx.Node, int]] = field(default_factory=dict)

    def call(self, before: fx.Node, target: Any, *args: Any) -> fx.Node:
        """Insert a call before a node."""
        return edit.Emitter(self.graph, like=before, before=before)(target, *args)

    def item(self, of: fx.Node, index: int) -> fx.Node:
        """Insert a node that takes one of several results of `of`."""
        return self.call(of.next, operator.getitem, of, index)

    def swap(self, old: fx.Node, new: fx.Node) -> fx.Node:
        """Give `new` to all readers of `old`, and return it."""
        new.meta["val"] = old.meta["val"]
        self.instead.append(new)
        old.replace_all_uses_with(new)
        return new


def fits_kernels(grid: Any) -> bool:
    """Tell whether the kernels take a grid of these sides: few, and none that counts grids that are apart."""
    return len(grid) <= _MOST_SIDES and min(grid) > 0


def only(values: Iterable[Any]) -> Any:
    """Return the only value; None where there are none or several."""
    found = list(values)
    return found[0] if len(found) == 1 else None


def summands(add: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return the two operands of a plain sum of values with equal shapes and dtypes; None for anything else."""
    if add.target is not aten.add.Tensor or add.kwargs or not all(isinstance(value, fx.Node) for value in add.args):
        return None
    one, other = add.args
    (shape, dtype), theirs = ((v.meta["val"].shape, v.meta["val"].dtype) for v in (one, other))  # type: ignore[union-attr]
    return (one, other) if (shape, dtype) == theirs else None  # type: ignore[return-value]
