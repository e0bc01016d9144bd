"""Which strategy, with which numbers and on which schedule, suits a model and a budget? By unlabelled images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate
from torch import Tensor, nn

from gtp_fx.capture import capture_module
from gtp_fx.config import Options
from gtp_fx.damage.calibration import Calibration, bound
from gtp_fx.errors import GtpError, OptionError
from gtp_fx.inputs import call_signature
from gtp_fx.pipeline import run_passes
from gtp_fx.schedule import Schedule
from gtp_fx.strategies import Strategy


@dataclass(frozen=True)
class Trial:
    """What became of one strategy that was asked for.

    moved: how far the outputs moved from the original's, as `gtp_fx.damage.divergence` measures it: in nats of class scores, in
    relative squares of anything else. flops_ratio: of the result. refusal: why there is none, else empty.
    """

    asked: Strategy
    strategy: Strategy
    schedule: Schedule | None
    moved: float
    flops_ratio: float
    refusal: str = ""


@dataclass(frozen=True)
class TunedStrategy:
    """The best of what was tried: `optimize(model, strategy=tuned.strategy, schedule=tuned.schedule)`. Printing it gives a table."""

    strategy: Strategy
    schedule: Schedule
    moved: float
    trials: tuple[Trial, ...]

    def __str__(self) -> str:
        rows = [
            [trial.asked, trial.refusal or trial.strategy, "" if trial.refusal else f"{trial.moved:.3g}"]
            for trial in self.trials
        ]
        return tabulate(rows, ["asked", "found", "divergence"], disable_numparse=True)


def tune_strategy(
    model: nn.Module,
    images: Any,
    *,
    flops_budget: float | None = None,
    latency_budget: float | str | None = None,
    strategies: Sequence[str | Strategy] = ("gtp",),
    refine: int = 24,
    example_inputs: Any = None,
    **options: Any,
) -> TunedStrategy:
    """Find a strategy's numbers (GTP's alpha, M, score, theta) and the schedule that move `model`'s outputs least, without labels.

    images: some dozens, unlabelled, as `calibration=` takes them; more are better than more evaluations. strategies: names or values
    to start from; GTP's theta is varied from a value that has one below 1. refine: whole schedules tried for each. options: further
    ones of `optimize`. Takes about a forward pass of the images for each count at each block, each schedule, each variant.

    Raises what `optimize` does where no strategy can work; what some can't is in the trials.
    """
    if not strategies:
        raise OptionError("strategies=(): give names or values to start from, such as ('gtp', 'tome')")
    calibration = images if isinstance(images, Calibration) else Calibration(images, refine=refine, strategy=refine > 0)
    example = example_inputs if example_inputs is not None else _first(calibration)
    signature = call_signature(model, example)
    calibration = bound(calibration, signature.canonical)
    budgets: dict[str, Any] = {"flops_budget": flops_budget, "latency_budget": latency_budget, **options}
    asked = [Options.of(**budgets, strategy=strategy, calibration=calibration) for strategy in strategies]
    captured = capture_module(model, signature)
    trials, errors = [], []
    for checked in asked:
        try:
            made = run_passes(captured, checked)
        except GtpError as error:
            errors.append(error)
            trials.append(Trial(checked.strategy, checked.strategy, None, 0.0, 1.0, str(error).splitlines()[0]))
            continue
        moved = made.moved or 0.0  # where the exact passes alone meet the budget, nothing moves
        trials.append(Trial(checked.strategy, made.strategy, made.schedule, moved, made.report.flops_ratio))
    found = list(_succeeded(trials))
    if not found:
        raise errors[0]
    best, schedule = min(found, key=lambda pair: pair[0].moved)
    return TunedStrategy(best.strategy, schedule, best.moved, tuple(trials))


def _succeeded(trials: Sequence[Trial]) -> Iterator[tuple[Trial, Schedule]]:
    return ((trial, trial.schedule) for trial in trials if trial.schedule is not None)


def _first(calibration: Calibration) -> Any:
    """A batch to capture with: two images of the first."""
    first = calibration.batches()[0]
    return first[:2] if isinstance(first, Tensor) else first
