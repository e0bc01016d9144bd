"""Schedules by rule: "uniform", the paper's constant count a block, and "even", the same to the token.

Each is a line from gentle to harsh, on which the first that meets the budget is found by bisection."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from gtp_fx.plan.cost.chains import CostModel
from gtp_fx.plan.shortest_path import OverBudget
from gtp_fx.plan.site import Site


def mildest_within(model: CostModel, limit: float, line: ScheduleFamily) -> tuple[int, ...]:
    """The gentlest schedule of a line that costs at most `limit`. Raises OverBudget."""
    low, high = 0, line.steps(model.sites)
    if model.cost(line.at(model.sites, 0)) <= limit:
        return line.at(model.sites, 0)
    if (lowest := model.cost(line.at(model.sites, high))) > limit:
        raise OverBudget(lowest)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if model.cost(line.at(model.sites, middle)) <= limit else (middle, high)
    return line.at(model.sites, high)


class Even:
    """Tokens leave evenly over the blocks, as the paper's do, to the token instead of a constant count a block.

    Step t removes t/L tokens at each of a stream's L sites, rounded so that the running total is exact. Once they are
    too many for every block the last blocks get none left to remove, down to one patch token from the first block on.
    """

    def steps(self, sites: Sequence[Site]) -> int:
        per_stream = _per_stream(sites)
        return max((_most(site) * per_stream[site.stream] for site in sites), default=0)

    def at(self, sites: Sequence[Site], step: int) -> tuple[int, ...]:
        last, seen, removed = self.steps(sites), Counter[object](), Counter[object]()
        counts = []
        for site in sites:
            stream = site.stream
            seen[stream] += 1
            # At the last step the first site alone removes all but one.
            total = min(_most(site), (2 * step * seen[stream] * _most(site) + last) // (2 * last)) if last else 0
            counts.append(total - removed[stream])
            removed[stream] = total
        return tuple(counts)


class Uniform:
    """The paper's: the same number P of tokens leaves at every block."""

    def steps(self, sites: Sequence[Site]) -> int:
        per_stream = _per_stream(sites)
        return min((_most(site) // per_stream[site.stream] for site in sites), default=0)

    def at(self, sites: Sequence[Site], step: int) -> tuple[int, ...]:
        return (step,) * len(sites)


ScheduleFamily = Even | Uniform
SCHEDULE_FAMILIES: dict[str, ScheduleFamily] = {"even": Even(), "uniform": Uniform()}


def _most(site: Site) -> int:
    """One patch token always stays: attention and pooling over none are undefined."""
    return site.whole - 1


def _per_stream(sites: Sequence[Site]) -> Counter[object]:
    return Counter(site.stream for site in sites)
