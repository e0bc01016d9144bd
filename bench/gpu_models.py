"""How much faster are whole models on this GPU, against the same model compiled as well as torch can?

Original and optimised, each in every mode of torch.compile that is asked for, and the original eager: interleaved in one run, by CUDA's own
events. What counts is the best optimised against the best original.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import nn

import gtp_fx
from bench.live_weights import enliven
from gtp_fx.compare import rounding_tolerance
from gtp_fx.config import Options
from gtp_fx.forecast import Forecast
from gtp_fx.planner import Planner
from gtp_fx.targets import Target
from gtp_fx.timing import Run, Timings, clock_for, interleave


@dataclass(frozen=True)
class Subject:
    """timm's name, what it is made with, its image side, and batches worth timing, the most telling first."""

    name: str
    side: int
    batches: tuple[int, ...]
    made_with: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        made: nn.Module = timm.create_model(self.name, **self.made_with)
        return enliven(made).eval()


SUBJECTS = (
    Subject("deit_small_patch16_224", 224, (256, 1, 8, 64)),
    Subject("deit_base_patch16_224", 224, (256, 1, 8, 64)),
    Subject("vit_large_patch16_384", 384, (64, 1, 8)),
    Subject("vit_base_patch14_dinov2", 518, (64, 1, 8)),
    Subject("swin_tiny_patch4_window7_224", 224, (256, 1, 64)),
    Subject("samvit_base_patch16", 1024, (8, 1)),
)
DRY_SUBJECTS = (Subject("deit_tiny_patch16_224", 64, (2,), {"img_size": 64, "depth": 2}),)
_CHECKED = 4
"""Images of a batch whose outputs are compared."""
EAGER, ORIGINAL, OPTIMISED = "original eager", "original", "optimised"


@dataclass(frozen=True)
class ModelRow:
    """One model at one batch. seconds: medians by contender, "original default" and so on. error: of the optimised model compiled
    against itself eager. predicted: what the cost model says of the speed-up."""

    model: str
    side: int
    batch: int
    flops_ratio: float
    schedule: tuple[int, ...]
    seconds: dict[str, float]
    quartiles: dict[str, tuple[float, float]]
    speed_up: float
    speed_up_quartiles: tuple[float, float]
    best: tuple[str, str]
    error: float
    predicted: float

    def right(self, dtype: torch.dtype) -> bool:
        return self.error <= rounding_tolerance(dtype)  # False for NaN

    @property
    def of_saving(self) -> float:
        """The share of the time that FLOPs promise to save, that was saved."""
        return (1 - 1 / self.speed_up) / (1 - self.flops_ratio)


def time_models(
    subjects: Sequence[Subject],
    batches: Sequence[int] | None,
    modes: Sequence[str],
    budget: float,
    target: Target,
    dtype: torch.dtype,
    rounds: int,
) -> Iterator[ModelRow | str]:
    """A row for each model and batch, or why there is none, in a sentence. One at a time: the caller may stop between."""
    device = torch.device(target.device)
    for subject in subjects:
        model = subject.build().to(device, dtype)
        planner: Planner | None = None
        for batch in batches or subject.batches:
            images = torch.randn(batch, 3, subject.side, subject.side, generator=torch.Generator().manual_seed(0))
            images = images.to(device, dtype)
            planner = planner or Planner(model, images)
            options = Options.of(flops_budget=budget, target=target, batch=batch)
            try:
                yield _row(subject, model, images, planner.plan(options), target, modes, rounds)
            except torch.OutOfMemoryError:
                yield f"{subject.name} x{batch}: out of memory"
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()


@torch.no_grad()
def _row(
    subject: Subject,
    model: nn.Module,
    images: torch.Tensor,
    forecast: Forecast,
    target: Target,
    modes: Sequence[str],
    rounds: int,
) -> ModelRow:
    torch._dynamo.reset()
    schedule = list(forecast.schedule)
    plain = gtp_fx.optimize(model, schedule=schedule, target=target, example_inputs=images, compile=False)
    runs: dict[str, Run] = {EAGER: lambda: model(images)}
    for mode in modes:
        original: Any = torch.compile(model, mode=mode, dynamic=False)
        options = {"schedule": schedule, "target": target, "mode": mode}
        optimised: Any = torch.compile(model, backend="gtp", options=options, dynamic=False)
        runs[f"{ORIGINAL} {mode}"] = lambda run=original: run(images)  # type: ignore[misc]
        runs[f"{OPTIMISED} {mode}"] = lambda run=optimised: run(images)  # type: ignore[misc]
    wanted = plain(images[:_CHECKED])
    error = max(_error(run(), wanted) for name, run in runs.items() if name.startswith(OPTIMISED))  # compiles
    timings = interleave(runs, rounds=rounds, warmup=3, clock=clock_for(images.device))
    best = tuple(_fastest(timings, kind) for kind in (ORIGINAL, OPTIMISED))
    gain = timings.speed_up(best[1], best[0])
    spreads = {name: timings.spread(name) for name in runs}
    return ModelRow(
        model=subject.name,
        side=subject.side,
        batch=len(images),
        flops_ratio=forecast.flops_ratio,
        schedule=tuple(schedule),
        seconds={name: spread.median for name, spread in spreads.items()},
        quartiles={name: (spread.lower, spread.upper) for name, spread in spreads.items()},
        speed_up=gain.median,
        speed_up_quartiles=(gain.lower, gain.upper),
        best=best,  # type: ignore[arg-type]
        error=error,
        predicted=forecast.speed_up,
    )


def _error(found: Any, wanted: torch.Tensor) -> float:
    """The image that differs most, |found - wanted| / |wanted|."""
    one, other = (x[:_CHECKED].flatten(1).double() for x in (found, wanted))
    return float(((one - other).norm(dim=1) / other.norm(dim=1)).max())


def _fastest(timings: Timings, kind: str) -> str:
    own = [name for name in timings.seconds if name.startswith(kind + " ") and name != EAGER]
    return min(own, key=lambda name: timings.spread(name).median)
