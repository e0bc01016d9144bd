"""Latency budget: a share of the original's predicted time, or seconds per run."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from gtp_fx.errors import OptionError

_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class LatencyBudget:
    """Upper bound on predicted time; exactly one field is set.

    ratio: share of the original's predicted time, in (0, 1].
    seconds: time of one run of a batch.
    """

    ratio: float | None = None
    seconds: float | None = None

    @classmethod
    def of(cls, value: object) -> LatencyBudget:
        """Return a budget from a ratio in (0, 1], such as 0.74, or a time in us, ms or s, such as "4.5ms".

        Raises OptionError for anything else.
        """
        if isinstance(value, LatencyBudget):
            return value
        if isinstance(value, str):
            match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(us|ms|s)\s*", value)
            if match is not None and float(match[1]) > 0:
                return cls(seconds=float(match[1]) * _UNITS[match[2]])
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and 0 < value <= 1:
            return cls(ratio=float(value))
        raise OptionError(
            f"latency_budget={value!r}: give a ratio of the original's predicted time, 0 < r <= 1, or a time with its "
            f"unit, such as '4.5ms'"
        )

    def limit(self, original: float) -> float:
        """Return the limit in seconds, if the original takes `original` seconds."""
        return self.seconds if self.seconds is not None else float(self.ratio or 1.0) * original

    def __str__(self) -> str:
        return (
            f"{self.ratio:g} of the original's time" if self.ratio is not None else f"{(self.seconds or 0) * 1e3:g} ms"
        )
