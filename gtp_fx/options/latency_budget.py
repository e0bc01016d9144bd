"""A budget of time: a share of what the original takes, or seconds a run."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from gtp_fx.errors import OptionError

_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class LatencyBudget:
    """ratio: of the original's predicted time; or seconds: of one run of a batch. One of them is None."""

    ratio: float | None = None
    seconds: float | None = None

    @classmethod
    def of(cls, value: object) -> LatencyBudget:
        """0.74 is a ratio in (0, 1]; "4.5ms" an absolute time, in us, ms or s. Raises OptionError."""
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
        """Seconds, where the original takes `original`."""
        return self.seconds if self.seconds is not None else float(self.ratio or 1.0) * original

    def __str__(self) -> str:
        return (
            f"{self.ratio:g} of the original's time" if self.ratio is not None else f"{(self.seconds or 0) * 1e3:g} ms"
        )
