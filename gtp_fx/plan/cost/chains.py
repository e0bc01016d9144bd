"""The cost of every schedule of a graph in one currency, as a sum along chains of token counts.

    tokens     whole ── site 0 ── n_0 ── site 1 ── n_1 ── …
    costs             at[0](whole, n_0)  behind[0][n_0]   at[1](n_0, n_1)  behind[1][n_1]

What runs between a site and the next depends only on the tokens that remain there. What a site itself costs, and what
recovering its tokens later costs, depends on the counts before and after it. So pricing a schedule is a few lookups,
and the best schedule is a shortest path (`gtp_fx.plan.shortest_path`). Parallel streams, and branches, are chains of
their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gtp_fx.plan.cost.terms import Term
from gtp_fx.plan.site import Site
from gtp_fx.types.axes import Counts, TokenDomain
from gtp_fx.types.grids import Grid

Numbers = NDArray[Any]
"""int64 FLOPs, or float64 seconds."""
Crossing = Callable[[Sequence[int]], Any]
"""Return a cost that depends on several chains, from the tokens removed at each site."""
Transition = Callable[[Any, Any], Any]
"""Return a cost from the token counts before and after a site, numbers or arrays that broadcast.

A site's own work costs something only where tokens are removed; what runs across the site costs something either
way."""


@dataclass(frozen=True, eq=False)
class Chain:
    """The sites of one stream in order, or the one site of a branch; K sites in all.

    places: positions of the chain's sites among all sites.
    whole: tokens before the first site; for a branch, in each window.
    after [K, whole + 1]: cost of what runs after each site, by the number of tokens that remain.
    at: cost of each site itself.
    """

    places: tuple[int, ...]
    whole: int
    after: Numbers
    at: tuple[Transition, ...]

    def cost(self, remaining: Sequence[int]) -> Any:
        """Return the cost of a schedule. remaining: the tokens after each site."""
        total, before = 0, self.whole
        for after, cost_after, at in zip(remaining, self.after, self.at, strict=True):
            total += cost_after[after] + at(before, after)
            before = after
        return total


@dataclass(frozen=True, eq=False)
class CostModel:
    """The cost of every schedule over some sites, in FLOPs or seconds.

    sites: in graph order.
    chains: every stream, and every branch.
    fixed: cost of what no token count changes.
    crossing: costs that depend on several chains at once. They are part of every price. The solver works chain by chain
        and sees them only as budget that is already spent.
    original: cost of the original graph, which ratios refer to.
    """

    sites: tuple[Site, ...]
    chains: tuple[Chain, ...]
    fixed: Any
    crossing: tuple[Crossing, ...]
    original: Any

    def cost(self, propagated: Sequence[int]) -> Any:
        """Return the cost when `propagated[i]` patches are removed (or skip a branch) at site i."""
        total = self.fixed + self.crossing_cost(propagated)
        total += sum(chain.cost(remaining_tokens(chain, propagated)) for chain in self.chains)
        return total.item() if isinstance(total, np.generic) else total

    def crossing_cost(self, propagated: Sequence[int]) -> Any:
        """Return the part of the cost that depends on several chains at once."""
        return sum(term(propagated) for term in self.crossing)

    def ratio(self, propagated: Sequence[int]) -> float:
        """Return the cost as a share of the original's."""
        return float(self.cost(propagated) / self.original)


def remaining_tokens(chain: Chain, propagated: Sequence[int]) -> list[int]:
    """Return the tokens that remain after each site of a chain. propagated: the tokens removed at each of all sites."""
    remaining, now = [], chain.whole
    for place in chain.places:
        now -= propagated[place]
        remaining.append(now)
    return remaining


def cost_model(
    sites: tuple[Site, ...],
    terms: Sequence[Term],
    weigh: Callable[[Any], Any],
    change: Callable[[Site], Numbers],
    original: Any,
    dtype: type,
) -> CostModel:
    """Sort terms into chains and price them.

    weigh: returns the cost of a term's works, a number or an array as their amounts are.
    change: returns [tokens + 1] the change in cost of a branch, by the tokens of each window that go through it.
    original: cost of the original graph.
    dtype: of the costs, int64 or float64.
    """
    chains: list[Chain] = []
    fixed: Any = 0
    crossing: list[Crossing] = []
    # Every branch is a chain with one site, and the sites of one grid are a stream.
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
    # A term goes to the place in its chain that knows every token count it needs.
    for term in terms:
        grids, levels = {d.grid for d in term.domains}, sorted(d.level for d in term.domains)
        grid = next(iter(grids), None)
        around = None if term.site is None else sites[term.site].domain
        if around is not None and term.domains <= {around, around.at(around.level + 1)}:  # of a site, or done for it
            at[around.grid][around.level].append(_transition(term, around, weigh))
        elif around is not None:  # done for a site, on a value that runs over other tokens too: a map of attention
            crossing.append(_across(term, sites, weigh))
        elif not levels:  # no shortened tokens
            fixed += weigh(term.works(_only_whole))
        elif len(grids) == 1 and len(levels) == 1 and grid in behind:  # between two sites
            counts = np.arange(behind[grid].shape[1])
            behind[grid][levels[0] - 1] += weigh(term.works(_counting({TokenDomain(grid, levels[0]): counts})))
        elif len(grids) == 1 and len(levels) == 2 and levels[1] == levels[0] + 1:  # across one site
            assert grid is not None
            at[grid][levels[0]].append(_transition(term, TokenDomain(grid, levels[0]), weigh))
        else:  # several streams, or counts further apart
            crossing.append(_across(term, sites, weigh))
    for grid, places in streams.items():
        transitions = tuple(_summed(parts) for parts in at[grid])
        chains.append(Chain(tuple(places), grid_count(grid), behind[grid], transitions))
    return CostModel(sites, tuple(chains), fixed, tuple(crossing), original)


def grid_count(grid: Grid) -> int:
    """Return the number of patches of a whole grid."""
    return TokenDomain(grid).whole_count


def counts_after(sites: Sequence[Site], propagated: Sequence[int]) -> Counts:
    """Return the patches of every domain when `propagated[i]` are removed at site i."""
    remaining: dict[TokenDomain, int] = {}
    for site, count in zip(sites, propagated, strict=True):
        if site.branch is None:
            remaining[site.domain.at(site.domain.level + 1)] = _counting(remaining)(site.domain) - count
    return _counting(remaining)


def _counting(remaining: dict[TokenDomain, Any]) -> Counts:
    """Look up counts of shortened domains in a dictionary; level 0 is the whole grid."""
    return lambda domain: domain.whole_count if domain.level == 0 else remaining[domain]


def _across(term: Term, sites: Sequence[Site], weigh: Callable[[Any], Any]) -> Crossing:
    """Make a cost that needs the counts of several chains, or of sites further apart."""

    def cost(propagated: Sequence[int]) -> Any:
        if term.site is not None and not propagated[term.site]:
            return 0
        return weigh(term.works(counts_after(sites, propagated)))

    return cost


def _only_whole(domain: TokenDomain) -> int:
    assert domain.level == 0, domain
    return domain.whole_count


def _transition(term: Term, domain: TokenDomain, weigh: Callable[[Any], Any]) -> Transition:
    """Make the cost of a term from the counts before and after a site. domain: the tokens before it."""
    first, of_site = term.first, term.site is not None

    def cost(before: Any, after: Any) -> Any:
        works = term.works(_counting({domain: before, domain.at(domain.level + 1): after}))
        if not of_site:  # an add and a norm that run as one kernel, one before and one after the site
            return weigh(works)
        removes = np.asarray(after < before)
        if first:
            removes = removes & np.asarray(before == domain.whole_count)
        return weigh(works) * removes

    return cost


def _summed(parts: list[Transition]) -> Transition:
    return (lambda before, after: sum(part(before, after) for part in parts)) if parts else _nothing


def _nothing(before: Any, after: Any) -> int:
    return 0
