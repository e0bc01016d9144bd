"""How far this machine's times can be trusted: their spread over rounds, and how much of a processor was there."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from gtp_fx.errors import BusyError
from gtp_fx.measure.timing import Clock, Run, Timings, interleave

LEAST_SHARE = 0.8
"""Of a processor: with less, rates would come out more than a fifth too low."""
MOST_SPREAD = 0.25
_FEWEST = 3
"""Rounds whose quartiles say something."""


@dataclass(frozen=True)
class Steadiness:
    """How far times can be trusted.

    spread: half the distance between the quartiles of a contender's rounds, over their median; the middle contender's.
        None where there are too few rounds to tell.
    share: share of the time during which the thread that measured had a processor; None where another device worked.
    """

    spread: float | None
    share: float | None

    @classmethod
    def of(cls, timings: Timings, share: float | None) -> Steadiness:
        if timings.rounds < _FEWEST:
            return cls(None, share)
        spreads = (timings.spread(name) for name in timings.seconds)
        return cls(statistics.median((s.upper - s.lower) / 2 / s.median for s in spreads), share)

    @property
    def busy(self) -> str:
        """Return what shows that the machine is too busy; empty where nothing does."""
        if self.share is not None and self.share < LEAST_SHARE:
            return f"other programs left {self.share:.0%} of a processor to what was measured"
        if self.spread is not None and self.spread > MOST_SPREAD:
            return f"times differ by ± {self.spread:.0%} from round to round"
        return ""

    @property
    def warning(self) -> str:
        """Return a sentence for people who read the times of a machine that is too busy; empty where it isn't."""
        if not self.busy:
            return ""
        return f"this machine was too busy for times to be trusted: {self.busy}; run this again when it is idle"

    def must_be_steady(self) -> None:
        """Raise BusyError where the machine is too busy."""
        if self.busy:
            raise BusyError(
                f"this machine is too busy to be measured: {self.busy}, so its rates would be that far off; try again "
                f"when it is idle, or keep them all the same with --anyway"
            )

    def __str__(self) -> str:
        share = f", {self.share:.0%} of a processor" if self.share is not None else ""
        return ("too few to tell their spread" if self.spread is None else f"± {self.spread:.0%}") + share


@dataclass
class Share:
    """value: share of a context's time during which its thread had a processor; None until it ends."""

    value: float | None = None


@contextmanager
def processor_share() -> Iterator[Share]:
    """Measure, within the context, the share of the time during which this thread has a processor.

    A thread that computes has one all the time on an idle machine, and waits for one on a busy machine.
    """
    found = Share()
    wall, own = time.perf_counter(), time.thread_time()
    yield found
    found.value = (time.thread_time() - own) / (time.perf_counter() - wall)


def interleave_watched(
    contenders: Mapping[str, Run],
    device: torch.device,
    *,
    rounds: int,
    warmup: int,
    clock: Clock,
    progress: Callable[[], object],
) -> tuple[Timings, Steadiness]:
    """Time contenders that run on `device`, as `interleave` does; return how far the times can be trusted as well."""
    with processor_share() as share:
        timings = interleave(contenders, rounds=rounds, warmup=warmup, clock=clock, progress=progress)
    return timings, Steadiness.of(timings, share.value if device.type == "cpu" else None)
