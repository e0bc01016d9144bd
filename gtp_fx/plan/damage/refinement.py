"""Choosing by the outputs of whole schedules, since a sum of damage over blocks is only a model of them.

First, a few ways to spend the budget are tried (by measured damage, by the prior, by the paper's rules), and the one
that moves outputs least is taken. Then the measured tables are weighted at random, block by block, and solved again; a
schedule that does better becomes the new best. The number of these evaluations is `Calibration.refine`. Every schedule
is within the budget, because the solver returns no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gtp_fx.options.progress import Progress
from gtp_fx.plan.damage.tables import Damage
from gtp_fx.strategies.protocol import Strategy

Counts = tuple[int, ...]

_WIDEST, _NARROWEST = 0.8, 0.15
"""Standard deviation of the logarithm of a block's weight, at the first and the last evaluation."""
_TOGETHER = 0.5
"""Correlation between the weights of neighbouring blocks."""
_TURNS = 4
"""Rounds of coordinate search over strategy variants."""
_BETTER = 0.98
"""A variant is taken where it lowers the divergence to below this share of the best.

The margin is there because the same images judge many variants."""


@dataclass
class Search:
    """A search over schedules and strategies that remembers every schedule it tried.

    judge: returns how far outputs move under a schedule and a strategy.
    strategy: the strategy at present; `vary_strategy` may change it.
    total: number of evaluations planned, for the progress bar.
    progress: called before each evaluation, or None.
    seen: divergence of each schedule tried, under the first strategy.
    done: evaluations so far.
    """

    judge: Callable[[Counts, Strategy], float]
    strategy: Strategy
    total: int
    progress: Progress | None = None
    seen: dict[Counts, float] = field(default_factory=dict)
    done: int = 0
    _least: float | None = None

    def try_out(self, counts: Counts) -> float:
        """Return the divergence under a schedule, evaluated once."""
        if counts not in self.seen:
            self.seen[counts] = self._judged(counts, self.strategy)
        return self.seen[counts]

    @property
    def best(self) -> Counts:
        """The schedule of least divergence so far."""
        return min(self.seen, key=lambda counts: self.seen[counts])

    @property
    def least(self) -> float:
        """The divergence of the best schedule under the present strategy."""
        return self._least if self._least is not None else self.seen[self.best]

    def weigh_anew(self, damage: Damage, solve: Callable[[Damage], Counts], evaluations: int) -> None:
        """Search around the best schedule so far, by solving with tables weighted at random; the seed is fixed.

        The width of the weights shrinks geometrically over the evaluations.
        """
        random = np.random.default_rng(0)
        weights = np.zeros(len(damage.tables))
        least = self.seen[self.best]
        for turn in range(evaluations):
            width = _WIDEST * (_NARROWEST / _WIDEST) ** (turn / max(evaluations - 1, 1))
            found = weights + width * _smooth(random.standard_normal(len(weights)))
            value = self.try_out(solve(_weighted(damage, found)))
            if value < least:
                least, weights = value, found

    def vary_strategy(self, variants_of: Callable[[Strategy], Iterable[Strategy]]) -> int:
        """Change the strategy one field at a time while that lowers the divergence of the best schedule.

        variants_of: returns the variants of a strategy to try.

        Returns how many were tried.
        """
        counts = self.best
        least = self.seen[counts]
        tried = {self.strategy}
        for _ in range(_TURNS):
            before = self.strategy
            for variant in variants_of(before):
                if variant in tried:
                    continue
                tried.add(variant)
                value = self._judged(counts, variant)
                if value < _BETTER * least:
                    self._least, least, self.strategy = value, value, variant
            if self.strategy == before:
                break
        return len(tried) - 1

    def _judged(self, counts: Counts, strategy: Strategy) -> float:
        if self.progress is not None:
            self.progress("trying schedules", self.done, self.total)
        self.done += 1
        return self.judge(counts, strategy)


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
