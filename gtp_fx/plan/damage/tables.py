"""Expected damage of a schedule as a sum over its sites, which the solver minimises."""

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
    """The damage that each site is expected to do, and from that the damage of a schedule.

    tables: tables[i][m] is how far the output moves when site i alone removes m of all tokens, the lowest in its
        ranking. Ascends from 0.
    origin: where the tables come from.
    per_site: damage charged for using a site at all, however many tokens it removes.
    uncertainty: schedules whose damage exceeds the least by no more than this share count as equally good
        (`python -m bench.expected_damage`).

    A step from `before` tokens to `after`, of `whole`, does the sum of two damages, each of which is half the truth:

        tables[i][removed after] - tables[i][removed before]   the sites share one ranking: each removes the next
        tables[i][the same share of all]                       each site ranks anew: a site that ranks badly still does

    On small nets trained on digits, the sum ranks schedules closer to the divergence of their outputs than either part.
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
        """Return the damage of one step at a site, from the token counts before and after it, numbers or arrays."""
        table = self.tables[site]
        ordered = table[whole - after] - table[whole - before]
        alone = np.interp((before - after) / before * whole, np.arange(len(table)), table)
        return ordered + alone + self.per_site * (after < before)

    def of(self, chain: Chain, remaining: Sequence[int]) -> float:
        """Return the damage of one chain's schedule. remaining: the tokens after each of its sites."""
        steps = zip(chain.places, pairwise((chain.whole, *remaining)), strict=True)
        return float(sum(self.step(place, chain.whole, before, after) for place, (before, after) in steps))
