"""The schedule of least expected damage within a budget, by `gtp_fx.plan.shortest_path` over every chain of sites.

`least_damage` serves budgets in seconds, and `least_damage_few_sites` budgets in FLOPs, which don't show what a site
costs. Expected damage comes from `gtp_fx.plan.damage`. Schedules by rule ("uniform", "even") are in
`gtp_fx.plan.uniform`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gtp_fx.plan.cost.chains import Chain, CostModel, remaining_tokens
from gtp_fx.plan.damage.tables import Damage
from gtp_fx.plan.shortest_path import OverBudget, Path, Steps, solve

_FINE = 192
"""The most counts per chain that the solver chooses from at once.

Longer streams are solved over every second (third, …) count first, then over all counts near that solution.
"""
_ROUNDS = 8
"""Fixed-point iterations: each solves again with the cross-stream cost of the previous solution."""
_WORTH, _LOOSE = 0.09, 0.02
"""_WORTH: the most damage that one more site has to save, as a share of the least damage.
_LOOSE: the relative tolerance at which the least damage is found for that."""
_SITE_COST = 0.0117
"""What a site costs beside its FLOPs, as a share of the model's FLOPs: at a quarter removed it makes `_WORTH`."""


def least_damage(model: CostModel, damage: Damage, limit: float, levels: Levels | None = None) -> tuple[int, ...]:
    """Return the schedule of least damage that costs at most `limit`: the tokens removed at each site.

    levels: returns the token counts of a chain to choose from. By default every count; on long streams some of them
        first, and then those near the solution.

    Raises OverBudget where even the cheapest schedule costs more.
    """
    if levels is not None:
        return least_within(model, damage, limit, [levels(chain) for chain in model.chains])
    coarse = coarse_levels(model)
    found = least_within(model, damage, limit, coarse)
    fine = [around(chain, found, counts) for chain, counts in zip(model.chains, coarse, strict=True)]
    if all(len(some) == len(counts) for some, counts in zip(fine, coarse, strict=True)):
        return found
    return least_within(model, damage, limit, fine)


Levels = Callable[[Chain], NDArray[np.int64]]
"""Return the token counts of a chain to choose from, descending."""


def least_damage_few_sites(model: CostModel, damage: Damage, limit: float) -> tuple[int, ...]:
    """Return a schedule of little damage that uses few sites, for budgets in FLOPs, which don't show what a site costs.

    A site needs the attention map, so attention is no longer fused, and it sorts and moves tokens: time that isn't
    FLOPs, and compile time. Expected damage is known only to within some tens of per cent, and many schedules do about
    as well. So each site is charged a share of the least damage, which drops the sites that save less.

    The share is what the site's cost would save if tokens stayed for it instead. Where a share r of the FLOPs is
    removed, damage is about proportional to r², so that one more share c of the FLOPs saves 2 c / r of it: the more is
    removed, the less a site has to save, and the more sites there are.

    Raises OverBudget.
    """
    least = least_within(model, damage, limit, coarse_levels(model), _LOOSE)
    whole = sum(damage.of(chain, remaining_tokens(chain, least)) for chain in model.chains)
    removed = 1 - limit / float(model.cost((0,) * len(model.sites)))
    share = min(_WORTH, 2 * _SITE_COST / removed) if removed > 0 else _WORTH
    return least_damage(model, replace(damage, per_site=share * whole), limit)


def coarse_levels(model: CostModel) -> list[NDArray[np.int64]]:
    """Return the counts to choose from first, for each chain: every count, or on long streams every n-th."""
    levels = [np.arange(chain.whole, 0, -max(1, chain.whole // _FINE)) for chain in model.chains]
    return [counts if counts[-1] == 1 else np.append(counts, 1) for counts in levels]


def least_within(
    model: CostModel, damage: Damage, limit: float, levels: list[NDArray[np.int64]], tolerance: float = 1e-3
) -> tuple[int, ...]:
    """Return the schedule of least damage among the counts in `levels`, one array per chain.

    tolerance: relative, on damage.

    Raises OverBudget.
    """
    # The solver prices chains one by one. What depends on several chains at once is taken out of the budget beforehand,
    # as an estimate from the previous solution, until a solution costs no more than it was estimated at.
    steps = [damage_steps(chain, counts, damage) for chain, counts in zip(model.chains, levels, strict=True)]
    crossing = low = float(model.crossing_cost((0,) * len(model.sites)))
    # Estimates up to `low` were too low, and `high` left no schedule. Small steps up mostly do; else they are doubled.
    best, high, failed, most = None, math.inf, 0, 0.0
    for _ in range(_ROUNDS if model.crossing else 1):
        try:
            found = chosen_counts(model, solve(steps, limit - float(model.fixed) - crossing, tolerance))
        except OverBudget as over:
            if not model.crossing:
                raise OverBudget(over.cost + float(model.fixed)) from None
            high = crossing
            crossing = (low + high) / 2
            continue
        over_limit = float(model.cost(found)) - limit
        if over_limit > 0:
            low, failed = crossing, failed + 1
            raised = over_limit if failed < 3 else max(over_limit, 2 * most)
            most = max(most, raised)
            crossing = min(low + raised, (low + high) / 2)
            continue
        best = found
        if model.crossing_cost(found) >= crossing:
            break
        crossing = float(model.crossing_cost(found))
    if best is None:
        best = _cheapest(model, steps)
    if model.cost(best) > limit:
        raise OverBudget(float(model.cost(best)))
    return best


def _cheapest(model: CostModel, steps: Sequence[Steps]) -> tuple[int, ...]:
    """Return the cheapest of some schedules: the least that every chain alone costs, and all tokens at one site.

    What depends on several sites costs least where few of them are used.
    """
    schedules = [chosen_counts(model, solve([replace(chain, damage=chain.cost) for chain in steps], math.inf))]
    for chain, of_chain in zip(model.chains, steps, strict=True):
        for place in chain.places:
            counts = [0] * len(model.sites)
            counts[place] = int(of_chain.levels[0] - of_chain.levels[-1])
            schedules.append(tuple(counts))
    return min(schedules, key=model.cost)


def damage_steps(chain: Chain, levels: NDArray[np.int64], damage: Damage) -> Steps:
    """Return cost and damage [sites, levels, levels] of every step between two of `levels`, which descend.

    Entries of steps that would add tokens are 0 and are never read.
    """
    before, after = levels[:, None], levels[None, :]
    falls = after <= before
    cost = [np.where(falls, at(before, np.minimum(before, after)) + behind[after], 0.0) for behind, at in _sites(chain)]
    lost = [np.where(falls, damage.step(place, chain.whole, before, after), 0.0) for place in chain.places]
    return Steps(levels, np.array(cost, float), np.array(lost))


def _sites(chain: Chain):  # type: ignore[no-untyped-def]
    return zip(chain.after, chain.at, strict=True)


def around(chain: Chain, counts: Sequence[int], coarse: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return every count within one step of `coarse` around the coarse solution `counts`, descending."""
    step = int(-np.diff(coarse).min(initial=-1))
    if step == 1:
        return coarse
    near = {chain.whole}
    remaining = chain.whole
    for place in chain.places:
        remaining -= counts[place]
        near.update(range(max(1, remaining - step), min(chain.whole, remaining + step) + 1))
    return np.array(sorted(near, reverse=True), np.int64)


def chosen_counts(model: CostModel, path: Path) -> tuple[int, ...]:
    """Return the tokens removed at each site along a path of the solver, over all chains."""
    counts = [0] * len(model.sites)
    for chain, remaining in zip(model.chains, path.remaining, strict=True):
        before = chain.whole
        for place, after in zip(chain.places, remaining, strict=True):
            counts[place], before = before - after, after
    return tuple(counts)
