"""From a budget to the tokens that leave at each site.

"auto"     least expected damage within the budget (`gtp_fx.plan.shortest_path`, `gtp_fx.plan.damage`), at few sites where FLOPs are the budget
"uniform"  the paper's constant count a block
"even"     the same to the token, in total evenly over the blocks

The last two are lines of schedules, from gentle to harsh, on which the first that meets the budget is found by bisection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gtp_fx.plan.cost.chains import Chain, CostModel, remaining_tokens
from gtp_fx.plan.damage.tables import Damage
from gtp_fx.plan.shortest_path import OverBudget, Path, Steps, solve

_FINE = 192
"""Counts that the solver chooses from at once; of longer streams every second, third, … and then those around its choice."""
_ROUNDS = 8
"""Of solving anew with what crosses streams as the last solution has it."""
_WORTH, _LOOSE = 0.09, 0.02
"""What a site has to earn, as a share of the least damage; and how closely that is found out."""


def least_damage(model: CostModel, damage: Damage, limit: float, levels: Levels | None = None) -> tuple[int, ...]:
    """Tokens that leave at each site: the schedule of least damage that costs at most `limit`.

    levels: the counts to choose from, of each chain; where None every one, coarsely first where there are many.
    Raises OverBudget.
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


def least_damage_few_sites(model: CostModel, damage: Damage, limit: float) -> tuple[int, ...]:
    """The same where each site has to earn `_WORTH` of the least damage: for budgets in FLOPs, which don't see what a site costs.

    A site ranks tokens by attention whose map can't stay fused, sorts and moves them: time that is no FLOPs, and compile
    time. Damage is known to within some tens of per cent, and many schedules do as little; of those this is one with few sites.
    Raises OverBudget.
    """
    least = least_within(model, damage, limit, coarse_levels(model), _LOOSE)
    whole = sum(damage.of(chain, remaining_tokens(chain, least)) for chain in model.chains)
    return least_damage(model, replace(damage, per_site=_WORTH * whole), limit)


def coarse_levels(model: CostModel) -> list[NDArray[np.int64]]:
    """Of each chain the counts to choose from at first: all, or of long streams some."""
    levels = [np.arange(chain.whole, 0, -max(1, chain.whole // _FINE)) for chain in model.chains]
    return [counts if counts[-1] == 1 else np.append(counts, 1) for counts in levels]


def least_within(
    model: CostModel, damage: Damage, limit: float, levels: list[NDArray[np.int64]], tolerance: float = 1e-3
) -> tuple[int, ...]:
    """The schedule of least damage whose counts are among `levels`. Raises OverBudget."""
    steps = [damage_steps(chain, counts, damage) for chain, counts in zip(model.chains, levels, strict=True)]
    crossing = float(model.crossing_cost((0,) * len(model.sites)))
    best = None
    for _ in range(_ROUNDS if model.crossing else 1):
        try:
            found = chosen_counts(model, solve(steps, limit - float(model.fixed) - crossing, tolerance))
        except OverBudget as over:
            if best is None:
                raise OverBudget(over.cost + float(model.fixed) + crossing) from None
            break
        over_limit = float(model.cost(found)) - limit
        if over_limit > 0:  # what crosses chains came dearer than it was taken for
            crossing += over_limit
            continue
        best = found
        if model.crossing_cost(found) >= crossing:
            break
        crossing = float(model.crossing_cost(found))
    if best is None:
        raise OverBudget(float(model.cost(found)))
    return best


def damage_steps(chain: Chain, levels: NDArray[np.int64], damage: Damage) -> Steps:
    """What each step between two of `levels` costs and loses."""
    before, after = levels[:, None], levels[None, :]
    falls = after <= before
    cost = [np.where(falls, at(before, np.minimum(before, after)) + behind[after], 0.0) for behind, at in _sites(chain)]
    lost = [np.where(falls, damage.step(place, chain.whole, before, after), 0.0) for place in chain.places]
    return Steps(levels, np.array(cost, float), np.array(lost))


def _sites(chain: Chain):  # type: ignore[no-untyped-def]
    return zip(chain.behind, chain.at, strict=True)


def around(chain: Chain, counts: Sequence[int], coarse: NDArray[np.int64]) -> NDArray[np.int64]:
    """Every count near one that the coarse solution has, between its neighbours there."""
    step = int(-np.diff(coarse).min(initial=-1))
    if step == 1:
        return coarse
    near = {chain.whole}
    left = chain.whole
    for place in chain.places:
        left -= counts[place]
        near.update(range(max(1, left - step), min(chain.whole, left + step) + 1))
    return np.array(sorted(near, reverse=True), np.int64)


def chosen_counts(model: CostModel, path: Path) -> tuple[int, ...]:
    """Tokens that leave at each site along a path."""
    counts = [0] * len(model.sites)
    for chain, left in zip(model.chains, path.left, strict=True):
        before = chain.whole
        for place, after in zip(chain.places, left, strict=True):
            counts[place], before = before - after, after
    return tuple(counts)
