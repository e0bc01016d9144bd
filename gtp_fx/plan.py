"""A plan: the decision that the rewriting passes carry out."""

from __future__ import annotations

from dataclasses import dataclass

from gtp_fx.axes import TokenDomain
from gtp_fx.cost.closed_form import Site
from gtp_fx.schedule import Schedule
from gtp_fx.strategies.protocol import Strategy


@dataclass(frozen=True)
class Plan:
    """schedule: tokens that leave per block. sites: the places where some do, in graph order. strategy: how."""

    schedule: Schedule
    sites: tuple[Site, ...]
    strategy: Strategy

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
