"""A plan: the schedule, sites and strategy that the rewriting passes apply."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from gtp_fx.options.schedule import BlockShape, Schedule
from gtp_fx.plan.site import BranchCost, RestCost, Site
from gtp_fx.strategies.protocol import Strategy
from gtp_fx.strategies.registry import as_written
from gtp_fx.types.axes import TokenDomain
from gtp_fx.types.grids import Grid


@dataclass(frozen=True)
class Plan:
    """The result of planning, complete enough to rewrite the graph by it.

    schedule: how many tokens are removed (or skip a branch), or how many windows rest, at each block.
    sites: the sites at which some are, in graph order, with levels counted over these sites alone.
    strategy: the strategy, settled for the counts of this schedule.
    """

    schedule: Schedule
    sites: tuple[Site, ...]
    strategy: Strategy

    @classmethod
    def of(cls, sites: Sequence[Site], counts: Sequence[int], blocks: Sequence[BlockShape], strategy: Strategy) -> Plan:
        """Make a plan from a count for every possible site; sites with a count of 0 are dropped.

        sites, counts: every possible site, and how many tokens are removed there.
        blocks: the shape of every attention block.
        """
        removed = [0] * len(blocks)
        for site, count in zip(sites, counts, strict=True):
            removed[site.block] = count
        used = _numbered(site for site in sites if removed[site.block])
        settled = strategy.settled(removed_by_stream(used, [removed[site.block] for site in used]))
        planned_for = as_written(settled) if used else ""
        return cls(Schedule(tuple(removed), tuple(blocks), planned_for), used, settled)

    @property
    def removed(self) -> dict[int, int]:
        """Tokens removed, by block number; blocks that remove none have no entry."""
        return {site.block: self.schedule.removed[site.block] for site in self.sites if site.branch is None}

    @property
    def skipping(self) -> dict[int, int]:
        """Tokens of each window that skip a branch, by block number; blocks without any have no entry."""
        return self._counts(BranchCost)

    @property
    def resting(self) -> dict[int, int]:
        """Windows of each image that rest, by block number; blocks without any have no entry."""
        return self._counts(RestCost)

    @property
    def by_activity(self) -> frozenset[int]:
        """Return the blocks, by number, whose tokens skip a branch by how far they are from their window's mean."""
        return frozenset(s.block for s in self.sites if isinstance(s.branch, BranchCost) and s.branch.by_activity)

    def _counts(self, kind: type) -> dict[int, int]:
        """Return the counts of the sites whose branch is of a kind, by block number."""
        return {s.block: self.schedule.removed[s.block] for s in self.sites if isinstance(s.branch, kind)}

    def count(self, domain: TokenDomain) -> int:
        """Return the patch tokens in `domain`: the whole grid less what its first `domain.level` sites remove."""
        passed = [s for s in self.sites if s.domain.grid == domain.grid and s.branch is None][: domain.level]
        return domain.whole_count - sum(self.schedule.removed[site.block] for site in passed)


def removed_by_stream(sites: Sequence[Site], counts: Sequence[int]) -> list[tuple[Grid, list[int]]]:
    """Return, for each shortened stream, its grid and the tokens removed at each of its sites, in order.

    Sites where tokens skip a branch shorten no stream and are left out.
    """
    streams: dict[Grid, list[int]] = {}
    for site, count in zip(sites, counts, strict=True):
        if site.branch is None:
            streams.setdefault(site.domain.grid, []).append(count)
    return list(streams.items())


def _numbered(sites: Iterable[Site]) -> tuple[Site, ...]:
    """Return the sites with the level of their domain counted over these sites alone.

    Candidates number every possible site of a stream. Once some are dropped, only those that are kept shorten it.
    """
    levels = Counter[Grid]()
    numbered = []
    for site in sites:
        if site.branch is not None:
            numbered.append(site)
            continue
        numbered.append(replace(site, axis=site.axis.at(levels[site.domain.grid])))
        levels[site.domain.grid] += 1
    return tuple(numbered)
