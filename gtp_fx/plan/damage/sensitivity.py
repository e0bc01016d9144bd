"""Measured damage: how far the outputs move when one block alone removes tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from gtp_fx.options.progress import Progress
from gtp_fx.plan.damage.tables import Damage, Table
from gtp_fx.plan.site import Site

_UNCERTAINTY = 0.4
"""How far measured damage is off, as `Damage.uncertainty`.

Damage measured block by block was a factor of 1.15 to 1.65 (one standard deviation; geometric mean 1.4) off the
divergence of whole schedules on unseen images (`bench/results/expected_damage.json`)."""


def measured_damage(
    sites: Sequence[Site],
    points: int,
    judged: Callable[[tuple[int, ...]], float],
    images: int,
    progress: Progress | None = None,
) -> Damage:
    """Measure the damage of each site at `points` counts; in between, it is interpolated.

    judged: returns how far outputs move, from the tokens removed at each site.
    images: how many it is judged on, for the report.
    """
    planned = [counts_to_measure(site.whole, points) for site in sites]
    total, done = sum(map(len, planned)), 0
    tables = []
    for place, counts in enumerate(planned):
        values = []
        for count in counts:
            if progress is not None:
                progress(f"block {sites[place].block}: {count} tokens removed", done, total)
            values.append(judged(tuple(count if i == place else 0 for i in range(len(sites)))))
            done += 1
        tables.append(_table(sites[place].whole, counts, values))
    return Damage(tuple(tables), f"measurement on {images} images", uncertainty=_UNCERTAINTY)


def counts_to_measure(whole: int, points: int) -> list[int]:
    """Return how many of `whole` tokens to remove in each measurement, with closer counts where few tokens remain."""
    shares = 1 - np.linspace(1, 0, points + 1)[1:] ** 1.5
    return sorted({max(1, min(whole - 1, round(float(share) * (whole - 1)))) for share in shares})


def _table(whole: int, counts: Sequence[int], values: Sequence[float]) -> Table:
    """Return [whole] the damage by tokens removed, made to ascend by a running maximum over the measured values."""
    ascending = np.maximum.accumulate([0.0, *values])
    return np.interp(np.arange(whole), [0, *counts], ascending)
