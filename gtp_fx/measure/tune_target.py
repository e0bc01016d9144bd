"""Measurement of a target's rates and curves on this machine, for `gtp-fx tune`: a minute or two of small kernels.

Each probe is a kernel with a known amount of work. Its time is the median over interleaved rounds. The best rates
become the roofs, and a kind of work's curve gives its share of the roof by amount.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone

import torch

from gtp_fx.measure.probes import CHAIN, LONG_CHAIN, SHORT_CHAIN, Probe, probes
from gtp_fx.measure.steadiness import Steadiness, interleave_watched, processor_share
from gtp_fx.measure.timing import clock_for
from gtp_fx.options.progress import Progress
from gtp_fx.report.text import table
from gtp_fx.targets.target import MOST_SHARE, Curve, Target
from gtp_fx.targets.work import DENSE, KINDS

ROUNDS = 9
_LEAST_SHARE = 1e-4
_LONG_ENOUGH, _MOST_REPEATS = 4e-3, 50
"""Least seconds of a timing, and most repeats of a kernel to reach them. A model runs kernels back to back too."""


def tune_target(
    target: Target,
    dtype: torch.dtype = torch.float32,
    rounds: int = ROUNDS,
    progress: Progress | None = None,
    anyway: bool = False,
) -> Target:
    """Return `target` with rates and curves measured on this machine's `target.device`.

    dtype: dtype of products and attention.
    rounds: rounds of timing; each runs every probe once.
    progress: called at every step.
    anyway: return what was measured on a busy machine, too.

    Raises BusyError where the machine is too busy.
    """
    device = torch.device(target.device)
    clock = clock_for(device)
    with torch.no_grad():
        asked = list(probes(device, dtype))
        if device.type == "cpu" and not anyway:  # don't let anybody wait for a refusal
            _must_be_idle(next(probe for probe in asked if probe.kind == "product"))
        total = len(asked) * (rounds + 2)
        done = 0

        def step(label: str) -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(label, done, total)

        # Run each probe twice before timing it (the first run compiles), and find the repeats that a timing needs.
        repeats = {}
        for probe in asked:
            probe.run()
            probe.run()
            taken = clock(probe.run)
            repeats[probe.name] = max(1, min(_MOST_REPEATS, round(_LONG_ENOUGH / max(taken, 1e-9))))
            step(f"compiling ({probe.kind or 'launches'})")
        runs = {probe.name: _repeated(probe.run, repeats[probe.name]) for probe in asked}
        timings, steady = interleave_watched(
            runs, device, rounds=rounds, warmup=1, clock=clock, progress=lambda: step("timing")
        )
    if not anyway:
        steady.must_be_steady()
    seconds = {name: statistics.median(values) / repeats[name] for name, values in timings.seconds.items()}
    made = fitted(target, asked, seconds, str(dtype).removeprefix("torch."), rounds)
    return replace(made, measured=f"{made.measured}, {steady}")


def _must_be_idle(probe: Probe) -> None:
    """Raise BusyError where this thread hasn't a processor of its own for half a second of a probe."""
    with processor_share() as share:
        end = time.perf_counter() + 0.5
        while time.perf_counter() < end:
            probe.run()
    Steadiness(None, share.value).must_be_steady()


def fitted(target: Target, timed: Sequence[Probe], seconds: dict[str, float], dtype: str, rounds: int) -> Target:
    """Return the target whose curves go through the times of probes.

    seconds: time of each probe, by name. It includes the two chains of small products.
    dtype: dtype of the products, as the target names it.
    rounds: rounds of timing, for the record.
    """
    # A kernel's launch cost: the two chains differ in nothing but the number of their kernels.
    launch = max((seconds[LONG_CHAIN] - seconds[SHORT_CHAIN]) / (CHAIN - 1), 0.0)
    # Subtract from each probe what isn't its own work, but never so much that noise could make the rest 0 or negative.
    own = {}
    for probe in timed:
        taken = seconds[probe.name]
        beside = sum(seconds[name] for name in probe.less) if probe.less else launch
        own[probe.name] = max(taken - beside, 0.02 * taken)
    # The roofs: the fastest product gives FLOP/s, the largest stream bytes per second.
    dense = max(p.work.flops / own[p.name] for p in timed if p.kind == "product")
    longest = max((p for p in timed if p.kind == "stream"), key=lambda p: p.amount)
    bandwidth = longest.work.bytes / own[longest.name]
    # Each kind's curve: amount -> time at the roof / measured time, the mean where probes have the same amount.
    curves = {}
    for kind in dict.fromkeys(p.kind for p in timed if p.kind):
        points: dict[float, list[float]] = {}
        for probe in (p for p in timed if p.kind == kind):
            roof = probe.work.flops / dense if kind in DENSE else probe.work.bytes / bandwidth
            points.setdefault(probe.amount, []).append(roof / own[probe.name])
        shares = {amount: min(max(statistics.fmean(s), _LEAST_SHARE), MOST_SHARE) for amount, s in points.items()}
        curves[kind] = Curve(tuple(sorted(shares.items())))
    others = {name: rate for name, rate in target.dense.items() if name != dtype}
    # Rates of the other dtypes keep their listed proportion to the measured one.
    scaled = {name: rate * dense / target.rate(dtype) for name, rate in others.items()}
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return replace(
        target,
        dense={**scaled, dtype: dense},
        bandwidth=bandwidth,
        launch=launch,
        curves={**target.curves, **curves},
        measured=f"{when}, {dtype}, medians of {rounds} rounds",
        tiles=(),
        attention_tile=(1, 1),
    )


def _repeated(run: Callable[[], object], times: int) -> Callable[[], object]:
    def again() -> None:
        for _ in range(times):
            run()

    return again


def describe(target: Target) -> str:
    """Return a table of a measured target's rates and curves."""
    rates = ", ".join(f"{rate / 1e9:.4g} GFLOP/s in {dtype}" for dtype, rate in target.dense.items())
    rows = [
        [kind, re.split("[;,]", KINDS[kind])[0], *(f"{share:.2g}" for _, share in (curve.points[0], curve.points[-1]))]
        for kind, curve in target.curves.items()
    ]
    return "\n".join(
        [
            f"{target.name}: {rates}; {target.bandwidth / 1e9:.4g} GB/s; {target.launch * 1e6:.3g} us a kernel",
            f"({target.measured})",
            "",
            table(["kind of work", "", "share of the roof:\nleast amount", "largest"], rows, left=(0, 1)),
        ]
    )
