"""Interleaved timing of several callables.

A machine's speed drifts with its clocks, its other users and its temperature, so contenders timed one after the other
meet different conditions. Here each round runs every contender once. Ratios are taken within a round, and then their
median over rounds.

The order within a round matters too, because a contender leaves its caches and its heat to the next. The orders are the
rows of Williams' squares, in which each contender follows each other one equally often (E. J. Williams, Australian
Journal of Scientific Research A 2, 1949).
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
"""Runs a callable once and returns the seconds it took, including the work it launched."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some numbers, interpolated linearly.

    lower: first quartile.
    median: second quartile.
    upper: third quartile.
    """

    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(*np.quantile(values, (0.25, 0.5, 0.75)).tolist())


@dataclass(frozen=True)
class Timings:
    """Times of several contenders.

    seconds: by contender, one entry per round. Entry i of every contender is from the same round.
    """

    seconds: Mapping[str, tuple[float, ...]]

    @property
    def rounds(self) -> int:
        return len(next(iter(self.seconds.values())))

    def spread(self, name: str) -> Spread:
        """Return the spread of one contender's seconds per run."""
        return Spread.of(self.seconds[name])

    def speed_up(self, name: str, baseline: str) -> Spread:
        """Return how many times faster `name` is than `baseline`: the spread over rounds of baseline / name."""
        pairs = zip(self.seconds[baseline], self.seconds[name], strict=True)
        return Spread.of([base / own for base, own in pairs])

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict with each round's seconds and their spread, by contender."""
        return {name: {**asdict(self.spread(name)), "rounds": list(values)} for name, values in self.seconds.items()}


def interleave(
    contenders: Mapping[str, Run],
    *,
    rounds: int,
    warmup: int = 1,
    clock: Clock | None = None,
    progress: Callable[[], object] | None = None,
) -> Timings:
    """Time every contender once per round, in the orders of `balanced_orders`.

    The orders are balanced after `len(contenders)` rounds, or twice as many where that number is odd.

    rounds: rounds that count.
    warmup: rounds before them that don't count. Compile before calling this, not in the warm-up.
    clock: `cpu_seconds` where None.
    progress: called after each run, `len(contenders) * (warmup + rounds)` times in all.

    Raises OptionError where there is nothing to time. A contender's errors are not caught.
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
    """Return orders of `count` contenders in which each takes each place, and follows each other one, equally often.

    There are `count` orders, or 2 `count` where that is odd (Williams 1949).
    """
    # 0, 1, -1, 2, -2, …: its successive differences are all different, modulo `count`.
    zigzag = [step // 2 + 1 if step % 2 else -(step // 2) for step in range(count)]
    remaining = [[(start + step) % count for step in zigzag] for start in range(count)]
    if count % 2:
        remaining += [order[::-1] for order in remaining]
    # Concatenate the orders so that, if possible, no contender runs twice in a row at a border.
    orders = [remaining.pop(0)]
    while remaining:
        fitting = (place for place, order in enumerate(remaining) if order[0] != orders[-1][-1])
        orders.append(remaining.pop(next(fitting, 0)))
    return orders


def cpu_seconds(run: Run) -> float:
    """Return the wall time of `run`, in seconds."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cuda_seconds(run: Run) -> float:
    """Return the seconds between two CUDA events on the current stream, before and after `run`.

    The time that the host takes to launch work into an idle queue is included, its wait for the result is not.
    """
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def process_seconds(run: Run) -> float:
    """Return the CPU time of all of this process's threads, in seconds.

    It excludes the time that other processes take meanwhile. Too coarse for single kernels.
    """
    start = time.process_time()
    run()
    return time.process_time() - start


def model_clock(device: torch.device) -> Clock:
    """Return the clock for runs of whole models on `device`.

    CPU time on a single CPU thread, wall time on several, since threads wait for each other; CUDA events on a GPU.
    """
    on_one = device.type != "cuda" and torch.get_num_threads() == 1
    return process_seconds if on_one else clock_for(device)


def clock_for(device: torch.device) -> Clock:
    """Return the clock for single kernels on `device`: wall time on a CPU, CUDA events on a GPU."""
    return cuda_seconds if device.type == "cuda" else cpu_seconds
