"""What every schedule of a graph costs, in one currency: a sum along chains of token counts.

    tokens     whole ── site 0 ── n_0 ── site 1 ── n_1 ── …
    costs             at[0](whole, n_0)  behind[0][n_0]   at[1](n_0, n_1)  behind[1][n_1]

What runs behind a site and before the next depends on the tokens left there alone; what a site does itself, and what puts its
tokens back later, depends on how many there were and how many are left. So a schedule is priced by looking up a few
numbers, and the best one is a shortest path (`gtp_fx.plan.shortest_path`). Streams beside each other, and branches, are chains of
their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gtp_fx.plan.cost.terms import Counts, Term
from gtp_fx.plan.site import Site
from gtp_fx.types.axes import Grid, TokenDomain

Numbers = NDArray[Any]
"""int64 FLOPs, or float64 seconds."""
Crossing = Callable[[Sequence[int]], Any]
Transition = Callable[[Any, Any], Any]
"""From tokens before and behind a site, numbers or arrays that broadcast, to what that costs: the site itself only where some
leave, and what runs across it whether they do or not."""


@dataclass(frozen=True, eq=False)
class Chain:
    """One stream's sites in order, or one branch.

    places: their positions among all sites. whole: tokens before the first (of a branch: in each window). behind [K, whole + 1]:
    what runs over the tokens left behind each site, by how many they are. at: what each site costs itself.
    """

    places: tuple[int, ...]
    whole: int
    behind: Numbers
    at: tuple[Transition, ...]

    def cost(self, left: Sequence[int]) -> Any:
        """left: tokens behind each site."""
        total, before = 0, self.whole
        for after, behind, at in zip(left, self.behind, self.at, strict=True):
            total += behind[after] + at(before, after)
            before = after
        return total


@dataclass(frozen=True, eq=False)
class CostModel:
    """The cost of each schedule: of the graph with its tokens leaving, and of the original, which ratios are taken of.

    fixed: what no token count changes. crossing: what depends on several chains at once, from the tokens that leave at each site;
    it is priced, but the solver, which goes along one chain, sees it only through the budget that it leaves.
    """

    sites: tuple[Site, ...]
    chains: tuple[Chain, ...]
    fixed: Any
    crossing: tuple[Crossing, ...]
    original: Any

    def cost(self, propagated: Sequence[int]) -> Any:
        """When `propagated[i]` patches leave (or skip) at site i."""
        total = self.fixed + self.crossing_cost(propagated)
        total += sum(chain.cost(remaining_tokens(chain, propagated)) for chain in self.chains)
        return total.item() if isinstance(total, np.generic) else total

    def crossing_cost(self, propagated: Sequence[int]) -> Any:
        return sum(term(propagated) for term in self.crossing)

    def ratio(self, propagated: Sequence[int]) -> float:
        return float(self.cost(propagated) / self.original)


def remaining_tokens(chain: Chain, propagated: Sequence[int]) -> list[int]:
    left, now = [], chain.whole
    for place in chain.places:
        now -= propagated[place]
        left.append(now)
    return left


def cost_model(
    sites: tuple[Site, ...],
    terms: Sequence[Term],
    weigh: Callable[[Any], Any],
    change: Callable[[Site], Numbers],
    original: Any,
    dtype: type,
) -> CostModel:
    """Terms sorted into chains. weigh: a term's works, as a number or an array. change: of a branch, by tokens kept [tokens + 1]."""
    chains: list[Chain] = []
    fixed: Any = 0
    beside: list[Crossing] = []
    streams: dict[Grid, list[int]] = {}
    for place, site in enumerate(sites):
        if site.branch is not None:
            kept = change(site)
            chains.append(Chain((place,), site.branch.tokens, kept[None], (_nothing,)))
        else:
            streams.setdefault(site.domain.grid, []).append(place)
    behind: dict[Grid, Numbers] = {
        grid: np.zeros((len(places), grid_count(grid) + 1), dtype) for grid, places in streams.items()
    }
    at: dict[Grid, list[list[Transition]]] = {grid: [[] for _ in places] for grid, places in streams.items()}
    for term in terms:
        grids, levels = {d.grid for d in term.domains}, sorted(d.level for d in term.domains)
        grid = next(iter(grids), None)
        if term.site is not None:
            site = sites[term.site]
            level = site.domain.level
            at[site.domain.grid][level].append(_transition(term, site.domain, weigh))
        elif not levels:
            fixed += weigh(term.works(_only_whole))
        elif len(grids) == 1 and len(levels) == 1 and grid in behind:
            counts = np.arange(behind[grid].shape[1])
            behind[grid][levels[0] - 1] += weigh(term.works(_counting({TokenDomain(grid, levels[0]): counts})))
        elif len(grids) == 1 and len(levels) == 2 and levels[1] == levels[0] + 1:
            assert grid is not None
            at[grid][levels[0]].append(_transition(term, TokenDomain(grid, levels[0]), weigh))
        else:
            beside.append(_across(term, sites, weigh))
    for grid, places in streams.items():
        transitions = tuple(_summed(parts) for parts in at[grid])
        chains.append(Chain(tuple(places), grid_count(grid), behind[grid], transitions))
    return CostModel(sites, tuple(chains), fixed, tuple(beside), original)


def grid_count(grid: Grid) -> int:
    return TokenDomain(grid).whole_count


def counts_behind(sites: Sequence[Site], propagated: Sequence[int]) -> Counts:
    """The patches of every domain when `propagated[i]` leave at site i."""
    left: dict[TokenDomain, int] = {}
    for site, count in zip(sites, propagated, strict=True):
        if site.branch is None:
            left[site.domain.at(site.domain.level + 1)] = _counting(left)(site.domain) - count
    return _counting(left)


def _counting(left: dict[TokenDomain, Any]) -> Counts:
    return lambda domain: domain.whole_count if domain.level == 0 else left[domain]


def _across(term: Term, sites: Sequence[Site], weigh: Callable[[Any], Any]) -> Crossing:
    return lambda propagated: weigh(term.works(counts_behind(sites, propagated)))


def _only_whole(domain: TokenDomain) -> int:
    assert domain.level == 0, domain
    return domain.whole_count


def _transition(term: Term, domain: TokenDomain, weigh: Callable[[Any], Any]) -> Transition:
    """domain: the tokens before."""
    first, of_site = term.first, term.site is not None

    def cost(before: Any, after: Any) -> Any:
        works = term.works(_counting({domain: before, domain.at(domain.level + 1): after}))
        if not of_site:  # an add and a norm that run as one, before and behind the place where tokens may leave
            return weigh(works)
        leaves = np.asarray(after < before)
        if first:
            leaves = leaves & np.asarray(before == domain.whole_count)
        return weigh(works) * leaves

    return cost


def _summed(parts: list[Transition]) -> Transition:
    return (lambda before, after: sum(part(before, after) for part in parts)) if parts else _nothing


def _nothing(before: Any, after: Any) -> int:
    return 0
