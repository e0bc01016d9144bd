"""Timing with a clock that a test winds by hand: every expected number is worked out on paper."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter

import pytest
import torch

from gtp_fx.errors import GtpError
from gtp_fx.measure.timing import (
    Run,
    Spread,
    Timings,
    balanced_orders,
    clock_for,
    cpu_seconds,
    cuda_seconds,
    interleave,
    model_clock,
    process_seconds,
)


class Machine:
    """A machine whose clock moves only when a contender runs, `slowness` times slower each round that has passed."""

    def __init__(self, costs: dict[str, float], drift: float = 0.0) -> None:
        self.costs, self.drift = costs, drift
        self.now = 0.0
        self.log: list[str] = []

    def contenders(self) -> dict[str, Run]:
        return {name: lambda name=name: self._run(name) for name in self.costs}

    def _run(self, name: str) -> None:
        turn = len(self.log) // len(self.costs)
        self.log.append(name)
        self.now += self.costs[name] * (1 + self.drift * turn)

    def clock(self, run: Run) -> float:
        start = self.now
        run()
        return self.now - start


def test_every_round_runs_every_contender_once_in_orders_that_take_turns() -> None:
    machine = Machine({"a": 1, "b": 2, "c": 3})
    interleave(machine.contenders(), rounds=6, warmup=1, clock=machine.clock)
    rounds = ["".join(machine.log[i : i + 3]) for i in range(0, 21, 3)]
    assert rounds == ["abc", "bca", "cab", "cba", "bac", "acb", "abc"]


@pytest.mark.parametrize("count", range(1, 9))
def test_everyone_follows_everyone_else_equally_often(count: int) -> None:
    orders = balanced_orders(count)
    followed = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert len(followed) == count * (count - 1) and len(set(followed.values())) <= 1
    for place in range(count):
        assert set(Counter(order[place] for order in orders).values()) == {len(orders) // count}
    ends = [order[-1] != later[0] for order, later in itertools.pairwise([*orders, orders[0]])]
    assert all(ends) or count <= 2


def test_what_the_one_before_leaves_behind_does_not_favour_anyone() -> None:
    """Whoever runs after "hot" takes 10 % longer; in orders that only rotate it would always be the same one."""
    last = ""

    def run(name: str) -> None:
        nonlocal last
        machine.now += 1.1 if last == "hot" else 1.0
        last = name

    machine = Machine({})
    timings = interleave(
        {name: lambda name=name: run(name) for name in ("hot", "a", "b")}, rounds=12, clock=machine.clock
    )  # type: ignore[misc]
    assert sum(timings.seconds["a"]) == pytest.approx(sum(timings.seconds["b"]), rel=0.01)


def test_seconds_are_each_contenders_own_and_warm_up_does_not_count() -> None:
    machine = Machine({"a": 1.0, "b": 4.0}, drift=1.0)
    timings = interleave(machine.contenders(), rounds=2, warmup=1, clock=machine.clock)
    assert timings == Timings({"a": (2.0, 3.0), "b": (8.0, 12.0)})
    assert timings.rounds == 2


def test_a_drifting_machine_does_not_move_the_speed_up() -> None:
    machine = Machine({"slow": 3.0, "fast": 2.0}, drift=0.5)
    timings = interleave(machine.contenders(), rounds=9, warmup=0, clock=machine.clock)
    assert timings.spread("fast").upper > 1.3 * timings.spread("fast").lower
    speed_up = timings.speed_up("fast", "slow")
    assert (speed_up.lower, speed_up.median, speed_up.upper) == pytest.approx((1.5, 1.5, 1.5))


def test_a_speed_up_is_the_median_of_ratios_not_the_ratio_of_medians() -> None:
    timings = Timings({"base": (1.0, 4.0, 9.0), "own": (1.0, 1.0, 9.0)})
    assert timings.speed_up("own", "base").median == 1.0  # ratios 1, 4, 1; medians would say 4


def test_quartiles_are_interpolated() -> None:
    assert Spread.of([4.0, 1.0, 3.0, 2.0]) == Spread(1.75, 2.5, 3.25)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_progress_counts_warm_up_too() -> None:
    machine, calls = Machine({"a": 1, "b": 1}), []
    interleave(machine.contenders(), rounds=3, warmup=2, clock=machine.clock, progress=lambda: calls.append(1))
    assert len(calls) == 10


def test_timings_are_json() -> None:
    dumped = json.loads(json.dumps(Timings({"a": (1.0, 3.0)}).to_dict()))
    assert dumped == {"a": {"lower": 1.5, "median": 2.0, "upper": 2.5, "rounds": [1.0, 3.0]}}


@pytest.mark.parametrize(
    ("names", "rounds", "warmup"), [({}, 1, 0), ({"a": int}, 0, 0), ({"a": int}, -3, 0), ({"a": int}, 1, -1)]
)
def test_nothing_to_time_is_an_error(names: dict[str, Run], rounds: int, warmup: int) -> None:
    with pytest.raises(GtpError, match="at least one"):
        interleave(names, rounds=rounds, warmup=warmup)


def test_what_a_contender_raises_goes_through() -> None:
    def fail() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        interleave({"a": fail}, rounds=1)


def test_the_clock_fits_the_device() -> None:
    assert clock_for(torch.device("cpu")) is cpu_seconds
    assert clock_for(torch.device("cuda", 0)) is cuda_seconds
    assert cpu_seconds(lambda: sum(range(100_000))) > 0


def test_whole_models_on_one_thread_are_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process's work is no part of it, nor is waiting."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    clock = model_clock(torch.device("cpu"))
    assert clock is process_seconds
    assert clock(lambda: time.sleep(0.2)) < 0.1 < clock_for(torch.device("cpu"))(lambda: time.sleep(0.2))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert model_clock(torch.device("cpu")) is cpu_seconds
