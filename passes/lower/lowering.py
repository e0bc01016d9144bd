"""The walk's state while operators become kernels, and the questions that several of its steps ask."""

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


@dataclass
class Lowering:
    """The walk's state. stock: what torch's own attention would do there; None where that isn't known. told: how attention is told scales,
    `Target.told`. instead: new nodes that have taken old ones' places. maps: by the index of a level's tokens into the grid, the map
    that `select` left, and the grid's cells."""

    graph: fx.Graph
    kernels: Kernels
    stock: StockAttention | None = None
    told: str = "auto"
    instead: list[fx.Node] = field(default_factory=list)
    maps: dict[fx.Node, tuple[fx.Node, int]] = field(default_factory=dict)

    def call(self, before: fx.Node, target: Any, *args: Any) -> fx.Node:
        return edit.Emitter(self.graph, like=before, before=before)(target, *args)

    def item(self, of: fx.Node, index: int) -> fx.Node:
        """One of several results."""
        return self.call(of.next, operator.getitem, of, index)

    def swap(self, old: fx.Node, new: fx.Node) -> fx.Node:
        new.meta["val"] = old.meta["val"]
        self.instead.append(new)
        old.replace_all_uses_with(new)
        return new


def only(values: Iterable[Any]) -> Any:
    """The only one; None where there are none or several."""
    found = list(values)
    return found[0] if len(found) == 1 else None


def summands(add: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two values of one shape and dtype whose plain sum `add` is; None where it is something else."""
    if add.target is not aten.add.Tensor or add.kwargs or not all(isinstance(value, fx.Node) for value in add.args):
        return None
    one, other = add.args
    (shape, dtype), theirs = ((v.meta["val"].shape, v.meta["val"].dtype) for v in (one, other))  # type: ignore[union-attr]
    return (one, other) if (shape, dtype) == theirs else None  # type: ignore[return-value]
