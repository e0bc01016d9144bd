"""Time and memory of several optimised models and their original, compiled or eager, in interleaved rounds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gtp_fx.errors import CheckError
from gtp_fx.graph.verify import rounding_tolerance
from gtp_fx.measure.benchmark import ORIGINAL
from gtp_fx.measure.compare import compile_checked
from gtp_fx.measure.evaluation.subject import Model
from gtp_fx.measure.timing import Spread, Timings, interleave, model_clock
from gtp_fx.options.progress import Steps

_WARMUP = 1


@dataclass(frozen=True)
class Times:
    """Time and memory of one model, over `rounds` rounds in which each model ran once.

    batch: images in a run.
    seconds: of a run.
    original: the original's median seconds in the same rounds.
    speed_up: the original's seconds / these, within each round.
    peak_bytes: most memory of the GPU that tensors took during a run, weights included; None on a CPU, where torch
        keeps no such count.
    """

    batch: int
    rounds: int
    seconds: Spread
    original: float
    speed_up: Spread
    peak_bytes: int | None

    @property
    def images_per_second(self) -> float:
        """Images in the median run, by its seconds."""
        return self.batch / self.seconds.median

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Times:
        """Return what `dataclasses.asdict` has made a dict of."""
        return cls(**{**values, "seconds": Spread(**values["seconds"]), "speed_up": Spread(**values["speed_up"])})


def compiled_models(
    eager: Mapping[str, Model], compiled: Mapping[str, Model], images: Tensor, steps: Steps
) -> tuple[dict[str, Model], dict[str, str]]:
    """Call compiled models for the first time, which compiles them, and check each against its eager form.

    images: a batch of the size that will be run.

    Returns the models whose output is right by name, the original among them, and for the others the reason by name.
    Raises CheckError where the original itself is compiled wrongly.
    """
    wrong = {}
    for name, model in compiled.items():
        steps.begin(f"compiling {name}")
        run = functools.partial(model, images)
        try:
            compile_checked(name, run, eager[name](images), rounding_tolerance(images.dtype), images.device)
        except CheckError as error:
            if name == ORIGINAL:
                raise
            wrong[name] = str(error)
        steps.done()
    return {name: model for name, model in compiled.items() if name not in wrong}, wrong


def times_of(models: Mapping[str, Model], images: Tensor, rounds: int, steps: Steps) -> dict[str, Times]:
    """Time models that have run before, the original among them, and measure their memory.

    images: [B, …], on the models' device.
    """
    runs = {name: functools.partial(model, images) for name, model in models.items()}
    peaks = {name: _peak(run, images.device) for name, run in runs.items()}
    steps.begin("timing")
    timings = interleave(runs, rounds=rounds, warmup=_WARMUP, clock=model_clock(images.device), progress=steps.done)
    return {name: _times(timings, name, len(images), peaks[name]) for name in models}


def steps_of_timing(models: int, rounds: int) -> int:
    """Return how many steps `times_of` reports."""
    return models * (_WARMUP + rounds)


def _times(timings: Timings, name: str, batch: int, peak: int | None) -> Times:
    original, gain = timings.spread(ORIGINAL).median, timings.speed_up(name, ORIGINAL)
    return Times(batch, timings.rounds, timings.spread(name), original, gain, peak)


def _peak(run: Callable[[], Any], device: torch.device) -> int | None:
    """Return the most bytes that tensors take on a GPU during a run; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)
