"""Intervals of 95 %: of a share, of the difference between two shares on the same images, and of a mean."""

from __future__ import annotations

import math
from dataclasses import dataclass

_Z = 1.959964
"""The normal distribution's quantile of 97.5 %."""


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; no number and nothing is `nan`."""

    value: float
    low: float
    high: float


def share(right: float, images: float) -> Estimate:
    """Return right / images with Wilson's interval (E. B. Wilson, JASA 22, 1927), which stays within [0, 1]."""
    if not images:
        return Estimate(math.nan, math.nan, math.nan)
    p, z2 = right / images, _Z * _Z / images
    middle = (p + z2 / 2) / (1 + z2)
    half = _Z / (1 + z2) * math.sqrt(p * (1 - p) / images + z2 / (4 * images))
    # At shares of 0 and 1 the interval ends there, but for rounding.
    return Estimate(p, min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half)))


def difference(lost: float, won: float, images: float) -> Estimate:
    """Return (won - lost) / images, how much a share changed on the same images, with a paired interval.

    lost: images that were right before alone.
    won: images that are right since alone.

    One more of each is added for the interval, which keeps it honest where both are few (D. G. Bonett and R. M. Price,
    Journal of Educational and Behavioral Statistics 37, 2012).
    """
    if not images:
        return Estimate(math.nan, math.nan, math.nan)
    before, since = (lost + 1) / (images + 2), (won + 1) / (images + 2)
    middle = since - before
    half = _Z * math.sqrt((before + since - middle * middle) / (images + 2))
    return Estimate((won - lost) / images, max(-1.0, middle - half), min(1.0, middle + half))


def mean(count: float, total: float, squares: float) -> Estimate:
    """Return total / count with the interval of a normal distribution; of a single value it is unknown, `nan`.

    squares: sum of the values' squares.
    """
    if not count:
        return Estimate(math.nan, math.nan, math.nan)
    value = total / count
    if count < 2:
        return Estimate(value, math.nan, math.nan)
    half = _Z * math.sqrt(max(0.0, squares / count - value * value) / (count - 1))
    return Estimate(value, value - half, value + half)
