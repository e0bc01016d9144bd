"""Choosing by the outputs of whole schedules, since a sum of damage over blocks is only a model of them.

First, a few ways to spend the budget are tried (by measured damage, by the prior, by the paper's rules), and the one
that moves outputs least is taken. Then the measured tables are weighted at random, block by block, and solved again; a
schedule that does better becomes the new best. The number of these evaluations is `Calibration.refine`. Every schedule
is within the budget, because the solver returns no other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gtp_fx.options.progress import Progress
from gtp_fx.plan.damage.tables import Damage

Counts = tuple[int, ...]

_WIDEST, _NARROWEST = 0.8, 0.15
"""Standard deviation of the logarithm of a block's weight, at the first and the last evaluation."""
_TOGETHER = 0.5
"""Correlation between the weights of neighbouring blocks."""


@dataclass
class Search:
    """A search over schedules that remembers every one it tried.

    judge: returns how far outputs move under a schedule.
    total: number of evaluations planned, for the progress bar.
    progress: called before each evaluation, or None.
    seen: divergence of each schedule tried.
    """

    judge: Callable[[Counts], float]
    total: int = 0
    progress: Progress | None = None
    seen: dict[Counts, float] = field(default_factory=dict)

    def try_out(self, counts: Counts) -> float:
        """Return the divergence under a schedule, evaluated once."""
        if counts not in self.seen:
            if self.progress is not None:
                self.progress("trying schedules", len(self.seen), max(self.total, len(self.seen)))
            self.seen[counts] = self.judge(counts)
        return self.seen[counts]

    @property
    def best(self) -> Counts:
        """The schedule of least divergence so far."""
        return min(self.seen, key=lambda counts: self.seen[counts])

    @property
    def least(self) -> float:
        """The divergence of the best schedule."""
        return self.seen[self.best]

    def weigh_anew(self, damage: Damage, solve: Callable[[Damage], Counts], evaluations: int) -> None:
        """Search around the best schedule so far, by solving with tables weighted at random; the seed is fixed.

        The width of the weights shrinks geometrically over the evaluations.
        """
        random = np.random.default_rng(0)
        weights = np.zeros(len(damage.tables))
        least = self.least
        for turn in range(evaluations):
            width = _WIDEST * (_NARROWEST / _WIDEST) ** (turn / max(evaluations - 1, 1))
            found = weights + width * _smooth(random.standard_normal(len(weights)))
            value = self.try_out(solve(_weighted(damage, found)))
            if value < least:
                least, weights = value, found


def _smooth(noise: NDArray[np.float64]) -> NDArray[np.float64]:
    """Correlate each entry of some noise with the one before it, keeping its variance."""
    smooth = noise.copy()
    for i in range(1, len(noise)):
        smooth[i] = _TOGETHER * smooth[i - 1] + np.sqrt(1 - _TOGETHER**2) * noise[i]
    return smooth


def _weighted(damage: Damage, log_weights: Sequence[float] | NDArray[np.float64]) -> Damage:
    """Scale each table by exp of its weight."""
    tables = tuple(np.exp(w) * table for w, table in zip(log_weights, damage.tables, strict=True))
    return Damage(tables, damage.origin)
