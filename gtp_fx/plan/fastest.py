"""The fastest among schedules of nearly least damage, for FLOPs budgets on targets whose time doesn't follow FLOPs.

On a GPU every site launches kernels, and products are computed in whole tiles. Only predicted seconds show either.
Expected damage is known to within a factor (`Damage.uncertainty`). So among the schedules within the budget whose
damage lies within that factor of the least, the fastest is taken: one with few sites, and with counts at the edge of a
tile.

The search varies two prices, added to damage: one per second and one per site. Schedules with few sites lie inside the
convex hull of time and damage, where a single price finds none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gtp_fx.plan.cost.chains import CostModel, remaining_tokens
from gtp_fx.plan.damage.tables import Damage
from gtp_fx.plan.least_damage import around, chosen_counts, coarse_levels, damage_steps, least_within
from gtp_fx.plan.shortest_path import OverBudget, solve

_LOOSE = 0.02
"""Relative tolerance at which each candidate is solved."""
_PER_SITE = (0.0, 0.1, 0.3, 0.6)
"""Prices of a site, as shares of the least damage."""
_BISECTIONS = 4
"""Bisections of the price of time for each price of a site."""
_HIGHEST = 6
"""The price of time is searched between 2^-6 and 2^6 times the price at which all time weighs as much as all damage."""


def fastest_alike(flops: CostModel, seconds: CostModel, damage: Damage, limit: float) -> tuple[int, ...]:
    """Return the tokens to remove at each site, for the least predicted time under two bounds.

    FLOPs are at most `limit`, and damage exceeds the least possible by at most the share `damage.uncertainty`.
    flops, seconds: cost models over the same sites.

    Raises OverBudget.
    """
    levels = coarse_levels(flops)
    least = least_within(flops, damage, limit, levels, _LOOSE)
    allowed = (1 + damage.uncertainty) * _total(flops, damage, least)
    found = min(_candidates(flops, seconds, damage, limit, levels, least, allowed), key=seconds.cost)
    # Long streams were solved over some of their counts: solve again over every count near that solution.
    fine = [around(chain, found, counts) for chain, counts in zip(flops.chains, levels, strict=True)]
    if all(len(some) == len(counts) for some, counts in zip(fine, levels, strict=True)):
        return found
    return min((found, *_candidates(flops, seconds, damage, limit, fine, least, allowed)), key=seconds.cost)


def _candidates(
    flops: CostModel,
    seconds: CostModel,
    damage: Damage,
    limit: float,
    levels: Sequence[NDArray[np.int64]],
    least: tuple[int, ...],
    allowed: float,
) -> Iterator[tuple[int, ...]]:
    """Yield schedules within the budget and the allowed damage, beginning with `least`, the one of least damage."""
    yield least
    whole = _total(flops, damage, least)
    exchange = whole / float(seconds.cost(least))
    for per_site in _PER_SITE:
        priced = replace(damage, per_site=per_site * whole)
        low, high = -float(_HIGHEST), float(_HIGHEST)
        for _ in range(_BISECTIONS):
            price = exchange * 2 ** ((low + high) / 2)
            counts = _at(flops, seconds, priced, limit, levels, price)
            if counts is not None and _total(flops, damage, counts) <= allowed:
                low = (low + high) / 2
                yield counts
            else:
                high = (low + high) / 2


def _at(
    flops: CostModel,
    seconds: CostModel,
    damage: Damage,
    limit: float,
    levels: Sequence[NDArray[np.int64]],
    price: float,
) -> tuple[int, ...] | None:
    """Return the schedule of least damage + price * seconds within the budget.

    Returns None where no schedule is within it once costs that depend on several chains are added.
    """
    steps = []
    for chain, timed, counts in zip(flops.chains, seconds.chains, levels, strict=True):
        own = damage_steps(chain, counts, damage)
        steps.append(replace(own, damage=own.damage + price * damage_steps(timed, counts, damage).cost))
    crossing = float(flops.crossing_cost(tuple(0 for _ in flops.sites)))
    try:
        found = chosen_counts(flops, solve(steps, limit - float(flops.fixed) - crossing, _LOOSE))
    except OverBudget:
        return None
    return found if flops.cost(found) <= limit else None


def _total(model: CostModel, damage: Damage, counts: Sequence[int]) -> float:
    return sum(damage.of(chain, remaining_tokens(chain, counts)) for chain in model.chains)
