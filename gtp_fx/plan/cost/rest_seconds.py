"""The seconds of a block whose windows may rest, by how many are awake."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx

from gtp_fx.analysis.resting import Rest
from gtp_fx.plan.cost.chains import Numbers
from gtp_fx.plan.site import RestCost
from gtp_fx.strategies.protocol import Strategy
from gtp_fx.targets.work import Work


@dataclass(frozen=True)
class RestWork:
    """A work of a block whose windows may rest, with every window.

    of_each: the share of it that a window without padding has. of_cells: the share that is done for one that rests.
    joint: whether it is one work for both.
    """

    work: Work
    of_each: float
    of_cells: float
    joint: bool

    @classmethod
    def of(cls, rest: Rest, node: fx.Node, work: Work, strategy: Strategy) -> RestWork:
        """Return that of a block's node, or of a fused group of which it is one."""
        keys = strategy.rest_keys
        cells = float(rest.coarse_share(node, keys)) if strategy.rest_share else 0.0
        return cls(work, float(rest.share(node)), cells, keys == "cells" and node in rest.joint)


def rest_change(
    cost: RestCost, works: list[RestWork], dtype: str, keys: str, batch: int, seconds: Callable[[Work], Any]
) -> Numbers:
    """Return [windows + 1] the change in seconds by the windows that can rest and are awake; 0 where all are.

    works: the block's. keys: what cells attend to, as in `Rest.coarse_share`. seconds: of one work.
    """
    awake = np.arange(cost.tokens + 1)
    spent: Any = 0.0
    resting = cost.tokens - awake
    for of in works:
        work, of_each, of_cells = of.work, of.of_each, of.of_cells
        share = 1 - resting * (of_each - of_cells if of.joint else of_each)
        fewer = replace(work, flops=work.flops * share, bytes=work.bytes * share)
        # Each window attends on its own; other products have a row for each token.
        many = "batch" if work.kind == "attention" else "rows"
        fewer = replace(fewer, **{many: np.maximum(getattr(work, many) * share, 1)})
        spent = spent + seconds(fewer) - seconds(work)
        if of_cells and not of.joint:
            spent = spent + seconds(_for_cells(work, resting, of_each, of_cells, keys))
    # What is new: the windows' activity, sorting it, taking out those that are awake, and putting them back.
    size = getattr(torch, dtype).itemsize
    windows = cost.tokens * cost.images * batch
    values = windows * cost.patches * cost.features * size
    added = [
        Work("stream", bytes=2 * values),  # for their mean, and for how far they are from it
        Work("sort", bytes=windows * size),
        Work("gather", bytes=values * (3 + 2 * awake / cost.tokens), launches=3),
    ]
    return np.where(awake == cost.tokens, 0.0, spent + sum(seconds(work) for work in added))


def _for_cells(work: Work, resting: Any, of_each: float, of_cells: float, keys: str) -> Work:
    """Return the work that is done for windows that rest. resting: how many. keys: as above."""
    share = resting * of_cells
    cells = replace(work, flops=work.flops * share, bytes=work.bytes * share)
    if work.kind == "product":  # few rows read as many weights as many do
        weights = work.flops / (2 * work.rows) * getattr(torch, work.dtype).itemsize
        return replace(cells, rows=np.maximum(work.rows * share, 1), bytes=np.maximum(cells.bytes, weights))
    if work.kind != "attention":
        return replace(cells, rows=np.maximum(work.rows * share, 1))
    fewer = of_cells / of_each  # of a window's queries, and of its keys where those are cells, too
    sizes = {"rows": work.rows * fewer, "tokens": work.tokens}
    if keys == "cells":
        sizes = {"rows": work.rows * fewer**0.5, "tokens": work.tokens * fewer**0.5}
    return replace(cells, batch=np.maximum(work.batch * resting * of_each, 1), **sizes)
