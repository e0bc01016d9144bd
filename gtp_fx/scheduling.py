"""From a budget to a schedule.

A `Prior` orders schedules along one line, from "nothing leaves" to "as much as can"; FLOPs fall along it, so the
first one that meets the budget is found by bisection over the closed form. The two priors here use no knowledge of
the model; a damage model that does has its place behind the same protocol.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from gtp_fx.cost.closed_form import FlopsModel, Site
from gtp_fx.errors import BudgetError


class Prior(Protocol):
    """A line of schedules for some sites, from gentle to harsh."""

    @property
    def name(self) -> str: ...

    def steps(self, sites: Sequence[Site]) -> int:
        """The last step, at which the most tokens leave."""

    def at(self, sites: Sequence[Site], step: int) -> tuple[int, ...]:
        """Tokens that leave at each site; step 0 removes none."""


@dataclass(frozen=True)
class Even:
    """Tokens leave evenly over the blocks, as the paper's do, to the token instead of a constant count a block.

    Step t removes t/L tokens at each of a stream's L sites, rounded so that the running total is exact. Once they are
    too many for every block the last blocks get none left to remove, down to one patch token from the first block on.
    """

    name: str = "auto"

    def steps(self, sites: Sequence[Site]) -> int:
        return (
            max((_most(site) * per_stream[site.stream] for site in sites), default=0)
            if (per_stream := _per_stream(sites))
            else 0
        )

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


@dataclass(frozen=True)
class Uniform:
    """The paper's: the same number P of tokens leaves at every block."""

    name: str = "uniform"

    def steps(self, sites: Sequence[Site]) -> int:
        per_stream = _per_stream(sites)
        return min((_most(site) // per_stream[site.stream] for site in sites), default=0)

    def at(self, sites: Sequence[Site], step: int) -> tuple[int, ...]:
        return (step,) * len(sites)


PRIORS: dict[str, Prior] = {"auto": Even(), "uniform": Uniform()}


def solve(model: FlopsModel, budget: float, prior: Prior) -> tuple[int, ...]:
    """Tokens that leave at each site: the gentlest schedule of `prior` with FLOPs at most `budget` of the original's."""
    low, high = 0, prior.steps(model.sites)
    lowest = model.ratio(prior.at(model.sites, high))
    if model.ratio(prior.at(model.sites, 0)) <= budget:
        return prior.at(model.sites, 0)
    if lowest > budget:
        advice = "; schedule='auto' can go lower" if prior.name == "uniform" else ""
        raise BudgetError(
            f"flops_budget={budget:g} can't be reached: the lowest ratio that schedule={prior.name!r} gives on this model "
            f"is {_round_up(lowest):.3f}{advice}"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if model.ratio(prior.at(model.sites, middle)) <= budget else (middle, high)
    return prior.at(model.sites, high)


def _most(site: Site) -> int:
    """One patch token always stays: attention and pooling over none are undefined."""
    return site.domain.whole_count - 1


def _per_stream(sites: Sequence[Site]) -> Counter[object]:
    return Counter(site.stream for site in sites)


def _round_up(ratio: float) -> float:
    """To three digits, so that the number named can be asked for."""
    return -(-ratio * 1000 // 1) / 1000
