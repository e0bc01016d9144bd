"""Interleaved timing of several callables.

A machine's speed drifts: clocks, neighbours, heat. Timed one after the other, contenders meet different machines; so here
each round runs every contender once, and ratios are taken within a round before the median is taken over rounds. Who runs
after whom matters as well (caches, a clock that the one before has heated), so orders are those of Williams' squares, in which everyone
follows everyone else equally often (E. J. Williams, Australian Journal of Scientific Research A 2, 1949).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from gtp_fx.errors import OptionError

Run = Callable[[], object]
Clock = Callable[[Run], float]
"""Runs a callable once and says how many seconds it took, everything it launched included."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some numbers, interpolated linearly."""

    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(*np.quantile(values, (0.25, 0.5, 0.75)).tolist())


@dataclass(frozen=True)
class Timings:
    """seconds: per contender one entry a round, so entry i of two contenders came from the same round."""

    seconds: Mapping[str, tuple[float, ...]]

    @property
    def rounds(self) -> int:
        return len(next(iter(self.seconds.values())))

    def spread(self, name: str) -> Spread:
        """Seconds per run of one contender."""
        return Spread.of(self.seconds[name])

    def speed_up(self, name: str, baseline: str) -> Spread:
        """How many times faster `name` is than `baseline`: over rounds, the ratios baseline / name."""
        pairs = zip(self.seconds[baseline], self.seconds[name], strict=True)
        return Spread.of([base / own for base, own in pairs])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: each round's seconds and their spread, by contender."""
        return {name: {**asdict(self.spread(name)), "rounds": list(values)} for name, values in self.seconds.items()}


def interleave(
    contenders: Mapping[str, Run],
    *,
    rounds: int,
    warmup: int = 1,
    clock: Clock | None = None,
    progress: Callable[[], object] | None = None,
) -> Timings:
    """Time every contender once a round, in orders that take turns; `len(contenders)` rounds, or twice as many where they are odd, are balanced.

    warmup: rounds that run but do not count; compile before, not here. clock: `cpu_seconds` where None. progress: called
    after each run, warm-up included: `len(contenders) * (warmup + rounds)` times.

    Raises OptionError where there is nothing to time; what a contender raises goes through.
    """
    if not contenders:
        raise OptionError("no contenders to time; give at least one")
    if rounds < 1 or warmup < 0:
        raise OptionError(f"rounds={rounds}, warmup={warmup}: give at least one round and no negative warm-up")
    clock = clock or cpu_seconds
    names, orders = list(contenders), balanced_orders(len(contenders))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + rounds):
        for name in (names[place] for place in orders[turn % len(orders)]):
            taken = clock(contenders[name])
            if turn >= warmup:
                seconds[name].append(taken)
            if progress is not None:
                progress()
    return Timings({name: tuple(values) for name, values in seconds.items()})


def balanced_orders(count: int) -> list[list[int]]:
    """Orders of `count` contenders, in which each is at each place, and next after each other one, equally often."""
    inward = [
        step // 2 + 1 if step % 2 else -(step // 2) for step in range(count)
    ]  # 0, 1, -1, 2, -2, …: all differences once
    left = [[(start + step) % count for step in inward] for start in range(count)]
    if count % 2:
        left += [order[::-1] for order in left]
    orders = [left.pop(0)]
    while left:  # nobody after himself, where there are enough to choose from
        apart = (place for place, order in enumerate(left) if order[0] != orders[-1][-1])
        orders.append(left.pop(next(apart, 0)))
    return orders


def cpu_seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cuda_seconds(run: Run) -> float:
    """Between two events on the current stream, so that the host's launch of an idle queue is part of it and its wait for
    the result is not."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def process_seconds(run: Run) -> float:
    """CPU time of all of this process's threads: what others do on the machine meanwhile is no part of it. Too coarse for single kernels."""
    start = time.process_time()
    run()
    return time.process_time() - start


def model_clock(device: torch.device) -> Clock:
    """For runs of whole models: on one thread of a CPU its CPU time, with more of them the wall's, since they wait for each other."""
    on_one = device.type != "cuda" and torch.get_num_threads() == 1
    return process_seconds if on_one else clock_for(device)


def clock_for(device: torch.device) -> Clock:
    return cuda_seconds if device.type == "cuda" else cpu_seconds
