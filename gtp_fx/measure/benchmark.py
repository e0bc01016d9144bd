"""Benchmark of several optimised models against one original, interleaved in one run, as `gtp-fx bench` prints it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gtp_fx.errors import OptionError
from gtp_fx.graph.verify import rounding_tolerance
from gtp_fx.measure.compare import Agreement, agreement, compile_checked
from gtp_fx.measure.steadiness import Steadiness, interleave_watched
from gtp_fx.measure.timing import Run, Timings, model_clock
from gtp_fx.model.optimized_model import OptimizedModel
from gtp_fx.options.progress import Progress, Steps
from gtp_fx.report.text import number, table, wrapped

ORIGINAL = "original"
_WARMUP = 1


@dataclass(frozen=True)
class Entry:
    """One optimised model.

    name: its name in the benchmark.
    flops_ratio: its FLOPs / the original's.
    predicted: its time / the original's, both predicted by the target's cost model.
    agreement: comparison of its output with the original's.
    compile_seconds: duration of the first call, which compiles; None where eager.
    """

    name: str
    flops_ratio: float
    predicted: float
    agreement: Agreement
    compile_seconds: float | None


@dataclass(frozen=True)
class Benchmark:
    """Times of an original and several optimised models.

    how: "compiled" or "eager", the same for all models.
    batch: images per run.
    entries: the optimised models.
    timings: seconds per run of every model, including the original.
    steadiness: how far the timings can be trusted.
    """

    how: str
    batch: int
    entries: tuple[Entry, ...]
    timings: Timings
    steadiness: Steadiness

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict; times are seconds per batch."""
        rows = [
            {
                **asdict(entry),
                "speed_up": asdict(gain := self.timings.speed_up(entry.name, ORIGINAL)),
                "share_of_limit": gain.median * entry.flops_ratio,
            }
            for entry in self.entries
        ]
        return {
            "how": self.how,
            "batch": self.batch,
            "rounds": self.timings.rounds,
            "steadiness": asdict(self.steadiness),
            "entries": rows,
            "seconds": self.timings.to_dict(),
        }

    def __str__(self) -> str:
        rows = [[ORIGINAL, "1", number(self.timings.spread(ORIGINAL).median * 1e3), "1", "", "", "", ""]]
        for entry in self.entries:
            time, gain = self.timings.spread(entry.name), self.timings.speed_up(entry.name, ORIGINAL)
            rows.append(
                [
                    entry.name,
                    f"{entry.flops_ratio:.4f}",
                    number(time.median * 1e3),
                    f"{gain.median:.3f}×",
                    f"{gain.lower:.2f}–{gain.upper:.2f}",
                    f"{gain.median * entry.flops_ratio:.0%}",
                    f"{1 / entry.predicted:.3f}×",
                    f"{entry.agreement.cosine_mean:.4f}",
                ]
            )
        headers = ["", "FLOPs", "ms", "speed-\nup", "quartiles", "of\nlimit", "pre-\ndicted", "cosine"]
        return (
            f"{table(headers, rows, shortened=0)}\n"
            f"ms for a batch of {self.batch}, {self.how} against {self.how}; medians of {self.timings.rounds} "
            f"interleaved rounds,\nspeed-ups within rounds; predicted: compiled; limit: 1 / FLOPs;\n"
            f"cosine: of outputs with the original's, on a photograph: agreement, not accuracy\n"
            f"{wrapped(self.steadiness.warning)}"
        ).rstrip()


@torch.no_grad()
def benchmark(
    original: nn.Module,
    optimised: Mapping[str, OptimizedModel],
    images: Tensor,
    *,
    rounds: int,
    eager: bool = False,
    progress: Progress | None = None,
) -> Benchmark:
    """Check every model against the original, and its compiled form against its eager one, then time all of them.

    The original is compiled with the optimised models' Inductor options, which have to be the same.

    optimised: models by name.
    images: [B, …], on the models' device.
    rounds: rounds of timing; each runs every model once.
    eager: whether to compile nothing and time eager models.
    progress: called at every step.

    Raises CheckError where an output is wrong, and OptionError for no rounds or for models with different Inductor
    options. Errors of the compiler are not caught.
    """
    inductor = [fast.inductor_options for fast in optimised.values()]
    if not eager and any(options != inductor[0] for options in inductor):
        raise OptionError(
            f"models of different modes or targets, {inductor}: the original is compiled in one way; time them "
            f"separately"
        )
    torch.compiler.reset()
    steps = Steps((1 + len(optimised)) * ((not eager) + _WARMUP + rounds), progress)
    agreed = {name: agreement(original, fast, images) for name, fast in optimised.items()}
    eager_runs: dict[str, Run] = {ORIGINAL: lambda: original(images)}
    eager_runs |= {name: lambda fast=fast: fast.graph_module(images) for name, fast in optimised.items()}  # type: ignore[misc]
    seconds: dict[str, float | None] = dict.fromkeys(eager_runs)
    runs = eager_runs
    if not eager:
        compiled: Any = torch.compile(original, options=inductor[0] or None)
        runs = {ORIGINAL: lambda: compiled(images)}
        runs |= {name: lambda fast=fast: fast(images) for name, fast in optimised.items()}  # type: ignore[misc]
        # The first call compiles. Its output is checked before anything is timed.
        for name, run in runs.items():
            steps.begin(f"compiling {name}")
            seconds[name] = compile_checked(
                name, run, eager_runs[name](), rounding_tolerance(images.dtype), images.device
            ).seconds
            steps.done()
    steps.begin("timing")
    timings, steady = interleave_watched(
        runs, images.device, rounds=rounds, warmup=_WARMUP, clock=model_clock(images.device), progress=steps.done
    )
    entries = []
    for name, fast in optimised.items():
        forecast = fast.report.forecast
        assert forecast is not None
        entries.append(Entry(name, fast.report.flops_ratio, 1 / forecast.speed_up, agreed[name], seconds[name]))
    return Benchmark("eager" if eager else "compiled", len(images), tuple(entries), timings, steady)
