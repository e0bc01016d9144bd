"""A plan: the decision that the rewriting passes carry out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from gtp_fx.options.schedule import BlockShape, Schedule
from gtp_fx.plan.site import Site
from gtp_fx.strategies.protocol import Strategy
from gtp_fx.types.axes import Grid, TokenDomain


@dataclass(frozen=True)
class Plan:
    """schedule: tokens that leave per block. sites: the places where some do, in graph order. strategy: how, settled for them."""

    schedule: Schedule
    sites: tuple[Site, ...]
    strategy: Strategy

    @classmethod
    def of(cls, sites: Sequence[Site], counts: Sequence[int], blocks: Sequence[BlockShape], strategy: Strategy) -> Plan:
        """From the tokens that leave at each of all possible sites. blocks: every attention block's shape."""
        propagated = [0] * len(blocks)
        for site, count in zip(sites, counts, strict=True):
            propagated[site.block] = count
        used = _numbered(site for site in sites if propagated[site.block])
        settled = strategy.settled(leaving_by_stream(used, [propagated[site.block] for site in used]))
        return cls(Schedule(tuple(propagated), tuple(blocks)), used, settled)

    @property
    def propagated(self) -> dict[int, int]:
        """Tokens that leave, by block, for the blocks where any do."""
        return {site.block: self.schedule.propagated[site.block] for site in self.sites if site.branch is None}

    @property
    def skipping(self) -> dict[int, int]:
        """Tokens of each window that skip a branch, by block, for the blocks where any do."""
        return {site.block: self.schedule.propagated[site.block] for site in self.sites if site.branch is not None}

    def count(self, domain: TokenDomain) -> int:
        """Patch tokens of `domain`: of the whole grid, less what left at its first `level` sites."""
        passed = [s for s in self.sites if s.domain.grid == domain.grid and s.branch is None][: domain.level]
        return domain.whole_count - sum(self.schedule.propagated[site.block] for site in passed)


def leaving_by_stream(sites: Sequence[Site], counts: Sequence[int]) -> list[tuple[tuple[int, ...], list[int]]]:
    """Of each stream that tokens leave: its grid, and how many do, site by site."""
    streams: dict[Grid, list[int]] = {}
    for site, count in zip(sites, counts, strict=True):
        if site.branch is None:
            streams.setdefault(site.domain.grid, []).append(count)
    return [(tuple(grid.shape), leaving) for grid, leaving in streams.items()]


def _numbered(sites: Iterable[Site]) -> tuple[Site, ...]:
    """Sites with the level of their domain counted over these sites alone: only they shorten the stream."""
    levels = Counter[Grid]()
    numbered = []
    for site in sites:
        if site.branch is not None:
            numbered.append(site)
            continue
        numbered.append(replace(site, axis=site.axis.at(levels[site.domain.grid])))
        levels[site.domain.grid] += 1
    return tuple(numbered)
