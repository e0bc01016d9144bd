"""Expected damage of a schedule, as a sum over its sites: what the solver minimises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gtp_fx.plan.cost.chains import Chain

Table = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Damage:
    """tables[i][m]: how far the output moves when m of all its tokens leave at site i alone, the lowest of its ranking; ascends from 0.

    A step from `before` tokens to `after`, of `whole`, costs the sum of two answers, each a half of the truth:

        tables[i][gone behind] - tables[i][gone before]   one ranking: the next tokens in order leave, dearer ones each time
        tables[i][the same share of all]                  a ranking of each site's own: a bad place for choosing stays bad

    On small nets trained on digits the sum ranked schedules more nearly as the divergence of their outputs does than either half.
    origin: where the tables come from. per_site: what a site costs besides, however many leave there. uncertainty: by what share a
    schedule's damage may lie above the least and it is as good for all that is known (`python -m bench.expected_damage`).
    """

    tables: tuple[Table, ...]
    origin: str
    per_site: float = 0.0
    uncertainty: float = 0.0

    def __post_init__(self) -> None:
        for table in self.tables:
            if table[0] != 0 or (np.diff(table) < 0).any() or not np.isfinite(table).all():
                raise ValueError("damage ascends from 0")

    def step(self, site: int, whole: int, before: Any, after: Any) -> Any:
        """What is lost at a site, from the tokens before and behind it, numbers or arrays."""
        table = self.tables[site]
        ordered = table[whole - after] - table[whole - before]
        alone = np.interp((before - after) / before * whole, np.arange(len(table)), table)
        return ordered + alone + self.per_site * (after < before)

    def of(self, chain: Chain, left: Sequence[int]) -> float:
        """Of one chain's schedule. left: tokens behind each of its sites."""
        steps = zip(chain.places, pairwise((chain.whole, *left)), strict=True)
        return float(sum(self.step(place, chain.whole, before, after) for place, (before, after) in steps))
