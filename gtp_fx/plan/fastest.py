"""The fastest of schedules that nobody can tell from the best: for budgets in FLOPs on a processor whose time isn't FLOPs.

On a GPU a site costs kernels, tokens are worked on in whole tiles, and both show in predicted seconds only. Expected damage is known to
within a factor (`Damage.uncertainty`), so of all schedules within the budget whose damage is no further than that from the least, the
fastest is taken: few sites, and counts at a tile's border.

The search goes along two prices on damage, one of a second and one of a site, since the schedules of a few sites lie inside the hull
that a single price finds.
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
"""How closely each candidate is solved for."""
_PER_SITE = (0.0, 0.1, 0.3, 0.6)
"""Prices of a site, in shares of the least damage."""
_BISECTIONS = 4
"""Of the price of time, which doubles and halves from one at which all time weighs as much as all damage."""
_HIGHEST = 6
"""The logarithm of that price, to the base 2, to begin with."""


def fastest_alike(flops: CostModel, seconds: CostModel, damage: Damage, limit: float) -> tuple[int, ...]:
    """Tokens that leave at each site: FLOPs at most `limit`, damage within its uncertainty of the least, the least predicted time.

    flops, seconds: of the same sites. Raises OverBudget.
    """
    levels = coarse_levels(flops)
    least = least_within(flops, damage, limit, levels, _LOOSE)
    allowed = (1 + damage.uncertainty) * _total(flops, damage, least)
    found = min(_candidates(flops, seconds, damage, limit, levels, least, allowed), key=seconds.cost)
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
    """Schedules within the budget and the allowed damage, the one of least damage among them."""
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
    """The schedule of least damage + price * seconds within the budget; None where what crosses streams takes it over."""
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
