"""Schedules by rule: "uniform", the paper's constant count per block, and "even", which spends the budget to the token.

Each rule is a family of schedules ordered from gentle to harsh; bisection finds the gentlest one within the budget.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from gtp_fx.plan.cost.chains import CostModel
from gtp_fx.plan.shortest_path import OverBudget
from gtp_fx.plan.site import Site


def mildest_within(model: CostModel, limit: float, family: ScheduleFamily) -> tuple[int, ...]:
    """Return the gentlest schedule of a family that costs at most `limit`.

    Raises OverBudget where even the harshest costs more.
    """
    low, high = 0, family.steps(model.sites)
    if model.cost(family.at(model.sites, 0)) <= limit:
        return family.at(model.sites, 0)
    if (lowest := model.cost(family.at(model.sites, high))) > limit:
        raise OverBudget(lowest)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if model.cost(family.at(model.sites, middle)) <= limit else (middle, high)
    return family.at(model.sites, high)


class Even:
    """Removal spread evenly over the blocks like the paper's, but exact to the token rather than one count per block.

    Step t removes t/L tokens at each of a stream's L sites, rounded so that the running total is exact. Once that is
    more than a stream holds, its last blocks have nothing to remove; at the last step, the first site alone removes all
    but one patch token.
    """

    def steps(self, sites: Sequence[Site]) -> int:
        """Return the number of the harshest schedule."""
        per_stream = _per_stream(sites)
        return max((_most(site) * per_stream[site.stream] for site in sites), default=0)

    def at(self, sites: Sequence[Site], step: int) -> tuple[int, ...]:
        """Return the tokens to remove at each site, for one step."""
        last, seen, removed = self.steps(sites), Counter[object](), Counter[object]()
        counts = []  # each site removes what brings its stream to the running total
        for site in sites:
            stream = site.stream
            seen[stream] += 1
            total = min(_most(site), (2 * step * seen[stream] * _most(site) + last) // (2 * last)) if last else 0
            counts.append(total - removed[stream])
            removed[stream] = total
        return tuple(counts)


class Uniform:
    """The paper's schedule: the same number P of tokens is removed at every block.

    A stream with fewer tokens than that takes removes P until one patch is left, so that a small stage doesn't bound P.
    """

    def steps(self, sites: Sequence[Site]) -> int:
        """Return the number of the harshest schedule, which is the count per block."""
        per_stream = _per_stream(sites)
        return max((_most(site) // per_stream[site.stream] for site in sites), default=0)

    def at(self, sites: Sequence[Site], step: int) -> tuple[int, ...]:
        """Return the tokens to remove at each site: `step`, or what its stream has left."""
        counts, removed = [], Counter[object]()
        for site in sites:
            counts.append(min(step, _most(site) - removed[site.stream]))
            removed[site.stream] += counts[-1]
        return tuple(counts)


ScheduleFamily = Even | Uniform
"""`at(sites, step)` returns one count per site: nothing is removed at step 0, and the most at `steps(sites)`."""
SCHEDULE_FAMILIES: dict[str, ScheduleFamily] = {"even": Even(), "uniform": Uniform()}


def _most(site: Site) -> int:
    """Return the most tokens a site can remove: one patch stays, as attention and pooling over none are undefined."""
    return site.whole - 1


def _per_stream(sites: Sequence[Site]) -> Counter[object]:
    return Counter(site.stream for site in sites)
