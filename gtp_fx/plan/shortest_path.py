"""The best schedule under a budget: the path of least damage through token counts whose cost stays within it.

A chain's schedule is a path from its whole token count downwards, one step per site, and costs and damages add up over
the steps. Least damage under a bound on cost is a constrained shortest path. It is solved exactly in two parts:

  1. Lagrange: a price on cost replaces the constraint, and dynamic programming finds the best path of every chain. The
     price at which the budget just holds gives a schedule, and a proof of how far from the best it can be at most.
  2. Where that is too far: labels (damage and cost so far) are carried along all paths. A label is dropped where
     another beats it in both, or where the bound from part 1 shows that it can't lead to a better path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

_MOST_LABELS, _STRETCHES = 20_000, 48
"""Above _MOST_LABELS labels, only the best label survives in each of _STRETCHES intervals of cost at each level.

The result is then no longer proven to be the best."""


@dataclass(frozen=True, eq=False)
class Steps:
    """The steps of one chain, with K sites and L levels.

    levels [L]: the token counts to choose from, descending from the whole count.
    cost [K, L, L]: cost of the step at each site from one level to another; only entries with to >= from are read.
    damage [K, L, L]: the same for damage.
    """

    levels: NDArray[np.int64]
    cost: Numbers
    damage: Numbers


@dataclass(frozen=True)
class Path:
    """One path for each chain, with their costs and damages summed.

    remaining: for each chain, the tokens that remain after each of its sites.
    cost: total cost, in the currency of the steps.
    damage: total damage.
    bound: a lower bound on the damage of every schedule within the budget.
    """

    remaining: tuple[tuple[int, ...], ...]
    cost: float
    damage: float
    bound: float


class OverBudget(Exception):
    """No schedule is within the budget. cost: what the cheapest one costs."""

    def __init__(self, cost: float) -> None:
        super().__init__(f"the cheapest schedule costs {cost}")
        self.cost = cost


def solve(chains: Sequence[Steps], budget: float, tolerance: float = 1e-3) -> Path:
    """Return the path of least damage whose cost is at most `budget`.

    tolerance: how far its damage may be from the least, as a share of it; 0 asks for the very best.

    Raises OverBudget where even the cheapest path costs more.
    """
    cheapest = _best(chains, damage_weight=0.0, price=1.0)
    if _cost(chains, cheapest) > budget:
        raise OverBudget(_cost(chains, cheapest))
    gentle = _best(chains, damage_weight=1.0, price=0.0)
    if _cost(chains, gentle) <= budget:
        damage = _damage(chains, gentle)
        return _path(chains, gentle, damage)
    # Two paths bracket the budget. The price at which both weigh the same gives a new path, which replaces one of them.
    over, within = gentle, cheapest
    price, bound = 0.0, _damage(chains, gentle)
    best = within
    while True:
        saved = _cost(chains, over) - _cost(chains, within)
        price = (_damage(chains, within) - _damage(chains, over)) / saved
        found = _best(chains, damage_weight=1.0, price=price)
        value = _damage(chains, found) + price * _cost(chains, found)
        bound = max(bound, value - price * budget)
        # No path weighs less at this price than the two that define it: the price is the best one.
        if value >= _damage(chains, within) + price * _cost(chains, within) - 1e-12 * max(1.0, abs(value)):
            break
        if _cost(chains, found) <= budget:
            within = found
            best = min(best, found, key=lambda path: _damage(chains, path))
        else:
            over = found
    least = _damage(chains, best)
    if least - bound > tolerance * abs(least) + 1e-12:
        better = _by_labels(chains, budget, price, least * (1 - tolerance))
        best = best if better is None else better
    return _path(chains, best, min(bound, _damage(chains, best)))


Chosen = list[list[int]]
"""For each chain, the position among its levels after each site."""


def _best(chains: Sequence[Steps], damage_weight: float, price: float) -> Chosen:
    """Return the path of least damage * damage_weight + cost * price, each chain on its own."""
    chosen: Chosen = []
    for chain in chains:
        to_go = _to_go(chain, damage_weight, price)
        at, path = 0, []
        for site in range(len(chain.cost)):
            options = damage_weight * chain.damage[site, at] + price * chain.cost[site, at] + to_go[site + 1]
            options[:at] = np.inf
            at = int(np.argmin(options))
            path.append(at)
        chosen.append(path)
    return chosen


def _to_go(chain: Steps, damage_weight: float, price: float) -> Numbers:
    """Return [K + 1, L]: the least weighted sum of the steps from each site on, by the level before that site."""
    sites, levels = len(chain.cost), len(chain.levels)
    upward = np.tril(np.full((levels, levels), np.inf), -1)
    to_go = np.zeros((sites + 1, levels))
    step, cost = np.empty_like(upward), np.empty_like(upward)  # memory for each step takes longer than its sums
    for site in reversed(range(sites)):
        np.multiply(chain.damage[site], damage_weight, out=step)
        step += np.multiply(chain.cost[site], price, out=cost)
        step += upward
        step += to_go[site + 1]
        step.min(axis=1, out=to_go[site])
    return to_go


def _by_labels(chains: Sequence[Steps], budget: float, price: float, under: float) -> Chosen | None:
    """Return the path of least damage within the budget if its damage is below `under`, else None.

    price: the price on cost found in part 1; its bound shows which labels can't lead to such a path.
    """
    prices = [_to_go(chain, 1.0, price) for chain in chains]
    costs = [_to_go(chain, 0.0, 1.0) for chain in chains]
    # A label is (at, damage, cost), one entry in each of three arrays. trail remembers which label each one extends.
    at, damage, cost = np.zeros(1, np.int64), np.zeros(1), np.zeros(1)
    trail: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for number, chain in enumerate(chains):
        later = sum(float(p[0, 0]) for p in prices[number + 1 :])
        later_cost = sum(float(c[0, 0]) for c in costs[number + 1 :])
        at = np.zeros_like(at)  # every chain begins at its whole count
        for site in range(len(chain.cost)):
            # Every label is extended to every level; those kept descend, fit the budget and can still beat `under`.
            origin, to = _in_reach(chain, site, at, damage, cost, price, prices[number][site + 1], under, budget, later)
            damages = damage[origin] + chain.damage[site][at[origin], to]
            sums = cost[origin] + chain.cost[site][at[origin], to]
            bound = damages + price * (sums - budget) + prices[number][site + 1][to] + later
            alive = (bound < under) & (sums + costs[number][site + 1][to] + later_cost <= budget)
            origin, at, damage, cost = origin[alive], to[alive], damages[alive], sums[alive]
            kept = _undominated(at, damage, cost)
            origin, at, damage, cost = origin[kept], at[kept], damage[kept], cost[kept]
            trail.append((origin, at))
            if not len(at):
                return None
    # Walk the trail back from the best label, then cut the levels into one list per chain.
    label = int(np.argmin(damage))
    flat: list[int] = []
    for origin, reached in reversed(trail):
        flat.append(int(reached[label]))
        label = int(origin[label])
    flat.reverse()
    ends = np.cumsum([len(chain.cost) for chain in chains]).tolist()
    return [flat[end - len(chain.cost) : end] for end, chain in zip(ends, chains, strict=True)]


def _in_reach(
    chain: Steps,
    site: int,
    at: NDArray[np.int64],
    damage: Numbers,
    cost: Numbers,
    price: float,
    to_go: Numbers,
    under: float,
    budget: float,
    later: float,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return labels and the levels below theirs that each may go to with a bound under `under`, and few others.

    The bound is a sum of what the label has so far and of what the step adds, so that a table of steps answers for all
    labels. It is rounded otherwise than a bound that is summed step by step; so it is taken a little too low.
    """
    step = chain.damage[site] + price * chain.cost[site] + to_go
    so_far = damage + price * cost
    limit = under + price * budget - later
    rounding = 1e-9 * (abs(under) + abs(price * budget) + abs(later) + float(np.abs(so_far).max()))
    step[np.tril_indices(len(step), -1)] = np.inf
    return np.nonzero(step[at] < (limit + rounding - so_far)[:, None])  # type: ignore[return-value]


def _undominated(at: NDArray[np.int64], damage: Numbers, cost: Numbers) -> NDArray[np.int64]:
    """Return the labels that none at the same level beats in both; of too many, the best in each interval of cost."""
    if at.max() < np.iinfo(np.int16).max:
        at = at.astype(np.int16)  # numpy sorts these by their bits
    if len(at) > _MOST_LABELS:
        width = max(float(np.ptp(cost)) / _STRETCHES, 1e-300)
        stretch = ((cost - cost.min()) / width).astype(np.int16)
        order = np.lexsort((cost, damage, stretch, at))
        new = np.diff(at[order], prepend=-1).astype(bool) | np.diff(stretch[order], prepend=-1).astype(bool)
        order = order[new]
    else:
        order = np.lexsort((damage, cost, at))
    # Costs ascend within a level, so a label is beaten unless it lowers the least damage so far. An offset per level
    # keeps the running minimum of one level from carrying over into the next.
    offset = at[order].astype(np.int64) * -(float(np.ptp(damage)) + 1.0) * 2
    lowered = damage[order] + offset
    least = np.minimum.accumulate(np.concatenate(([np.inf], lowered[:-1])))
    kept: NDArray[np.int64] = order[lowered < least]
    return kept


def _sum(values: Sequence[Any], chosen: Chosen) -> float:
    total = 0.0
    for matrices, path in zip(values, chosen, strict=True):
        at = 0
        for site, to in enumerate(path):
            total += float(matrices[site, at, to])
            at = to
    return total


def _cost(chains: Sequence[Steps], chosen: Chosen) -> float:
    return _sum([chain.cost for chain in chains], chosen)


def _damage(chains: Sequence[Steps], chosen: Chosen) -> float:
    return _sum([chain.damage for chain in chains], chosen)


def _path(chains: Sequence[Steps], chosen: Chosen, bound: float) -> Path:
    remaining = tuple(tuple(int(chain.levels[at]) for at in path) for chain, path in zip(chains, chosen, strict=True))
    return Path(remaining, _cost(chains, chosen), _damage(chains, chosen), bound)
