"""Choosing by looking at whole schedules: sums over blocks are a model, the outputs themselves are not.

Of a few ways to spend the budget (tables measured and guessed, the paper's even counts) the one that moves outputs least is taken;
then, for as many evaluations as were asked for, the measured tables are weighed anew at random, block by block, and the
schedule that the solver makes of them is kept where it is better. The budget holds throughout, since the solver keeps it.
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
"""How far neighbouring blocks are weighed alike."""
_TURNS = 4
"""Of changing a strategy that was changed before."""
_BETTER = 0.98
"""What a change of strategy has to lower the divergence to: the same images judge many of them."""


@dataclass
class Search:
    """judge: how far outputs move under a schedule and a strategy. Remembers what it has seen, and the best of it."""

    judge: Callable[[Counts, Strategy], float]
    strategy: Strategy
    total: int
    progress: Progress | None = None
    seen: dict[Counts, float] = field(default_factory=dict)
    done: int = 0
    _least: float | None = None

    def try_out(self, counts: Counts) -> float:
        if counts not in self.seen:
            self.seen[counts] = self._judged(counts, self.strategy)
        return self.seen[counts]

    @property
    def best(self) -> Counts:
        return min(self.seen, key=lambda counts: self.seen[counts])

    @property
    def least(self) -> float:
        """Of the best, with the strategy at hand."""
        return self._least if self._least is not None else self.seen[self.best]

    def weigh_anew(self, damage: Damage, solve: Callable[[Damage], Counts], evaluations: int) -> None:
        """Look for better ones around the best so far. The same each time."""
        random = np.random.default_rng(0)
        weights = np.zeros(len(damage.tables))
        least = self.seen[self.best]
        for turn in range(evaluations):
            width = _WIDEST * (_NARROWEST / _WIDEST) ** (turn / max(evaluations - 1, 1))
            found = weights + width * _smooth(random.standard_normal(len(weights)))
            value = self.try_out(solve(_weighed(damage, found)))
            if value < least:
                least, weights = value, found

    def vary_strategy(self, variants_of: Callable[[Strategy], Iterable[Strategy]]) -> int:
        """Change the strategy, one thing at a time, as long as the best schedule moves outputs less for it. How many it tried."""
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
    """Noise in which each entry is partly the one before; of the same spread."""
    smooth = noise.copy()
    for i in range(1, len(noise)):
        smooth[i] = _TOGETHER * smooth[i - 1] + np.sqrt(1 - _TOGETHER**2) * noise[i]
    return smooth


def _weighed(damage: Damage, log_weights: Sequence[float] | NDArray[np.float64]) -> Damage:
    tables = tuple(np.exp(w) * table for w, table in zip(log_weights, damage.tables, strict=True))
    return Damage(tables, damage.origin)
