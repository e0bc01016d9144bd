"""What a user asks for, validated before anything is touched. One value for both doors, `optimize` and the backend."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from gtp_fx.damage.calibration import Calibration
from gtp_fx.errors import OptionError
from gtp_fx.inductor_options import check_target, checked_mode, inductor_options
from gtp_fx.latency import LatencyBudget
from gtp_fx.schedule import Schedule
from gtp_fx.scheduling import AUTO, SCHEDULES
from gtp_fx.strategies import Strategy, strategy_named
from gtp_fx.targets import Target, target_named

DISABLEABLE = (
    "fold_constants",
    "spell_einsum",
    "spell_attention",
    "split_projections",
    "drop_dead_tokens",
    "fuse_projections",
    "lower_to_kernels",
)
"""Passes that may be left out, to see what one does or to do without. What a budget asks for can't be."""


@dataclass(frozen=True)
class Options:
    """Validated options.

    flops_budget: strict upper bound on FLOPs(result) / FLOPs(original), in (0, 1]; None where the schedule decides.
    latency_budget: the same of the time that `target` is predicted to take, instead; for runs of `batch` images
        (of a graph whose batch is fixed, for that).
    schedule: "auto", "uniform", "even", a Schedule, or tokens that leave in each attention block.
    disabled_passes: exact passes to leave out, names in `DISABLEABLE`. dump_graphs: a folder for the graph behind each pass.
    calibration: unlabelled images that schedule="auto" measures damage on; None for a prior. Bound to the model's calls.
    mode: torch.compile's, which wins over what the target tells Inductor.
    """

    flops_budget: float | None
    latency_budget: LatencyBudget | None
    batch: int
    schedule: str | Schedule | tuple[int, ...]
    strategy: Strategy
    target: Target
    disabled_passes: tuple[str, ...] = ()
    dump_graphs: str | None = None
    calibration: Calibration | None = None
    mode: str | None = None

    @classmethod
    def of(
        cls,
        flops_budget: float | None = None,
        latency_budget: float | str | LatencyBudget | None = None,
        batch: int = 8,
        schedule: str | Schedule | Sequence[int] = "auto",
        strategy: str | Strategy = "gtp",
        target: str | Target = "auto",
        disabled_passes: Sequence[str] = (),
        dump_graphs: str | None = None,
        calibration: Any = None,
        mode: str | None = None,
    ) -> Options:
        """Options from what a user wrote. Raises OptionError with the bad value and the good ones."""
        checked = _schedule(schedule)
        budget = _budget(flops_budget)
        latency = None if latency_budget is None else LatencyBudget.of(latency_budget)
        if budget is None and latency is None and isinstance(checked, str):
            raise OptionError(
                f"schedule={checked!r} needs a budget: give flops_budget=0.74 (a ratio in (0, 1]) or latency_budget=0.74, or "
                f"name the tokens that leave in each attention block, schedule=[8, 8, …]"
            )
        if latency is not None and (budget is not None or not isinstance(checked, str)):
            other = "flops_budget" if budget is not None else "a schedule that names its counts"
            raise OptionError(f"latency_budget={latency_budget!r} and {other}: give one of them")
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise OptionError(f"batch={batch!r}: give the images of a run, an integer of at least 1")
        if calibration is not None and checked != AUTO:
            raise OptionError(
                f"calibration= is what schedule='auto' learns from, and the schedule is {schedule!r}: give one"
            )
        processor = target_named(target)
        check_target(processor)
        return cls(
            budget,
            latency,
            batch,
            checked,
            strategy_named(strategy),
            processor,
            _disabled(disabled_passes),
            None if dump_graphs is None else str(dump_graphs),
            None if calibration is None else Calibration.of(calibration),
            checked_mode(mode),
        )

    @property
    def exact_only(self) -> bool:
        """Nothing but the exact passes is asked for."""
        return isinstance(self.schedule, str) and self.flops_budget == 1.0

    @property
    def budget(self) -> str:
        """As a person wrote it."""
        if self.latency_budget is not None:
            return f"latency_budget={self.latency_budget}"
        return "the counts given" if self.flops_budget is None else f"flops_budget={self.flops_budget:g}"

    def inductor(self, device: torch.device) -> dict[str, Any]:
        """What Inductor is told of a graph that runs on `device`."""
        return inductor_options(self.target, self.mode, device)

    def limit(self, original: float) -> float:
        """What the result may cost, in the budget's currency, where the original costs `original`."""
        if self.latency_budget is not None:
            return self.latency_budget.limit(original)
        assert self.flops_budget is not None
        return self.flops_budget * original

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> Options:
        """Options of `torch.compile(backend="gtp", options={…})`: the same names as `optimize`'s."""
        known = [f.name for f in fields(cls) if f.name != "calibration"]
        if "calibration" in options:
            raise OptionError(
                "calibration runs the model, and a backend has its graph alone: call gtp_fx.optimize(model, calibration=…) "
                "once and give what it found, options={'schedule': optimised.schedule}"
            )
        unknown = sorted(set(options) - set(known))
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else "."
            raise OptionError(
                f"unknown option {', '.join(map(repr, unknown))}{meant} The backend knows {', '.join(known)}"
            )
        return cls.of(**options)


def _disabled(names: Any) -> tuple[str, ...]:
    given = (names,) if isinstance(names, str) else tuple(names)
    if unknown := [name for name in given if name not in DISABLEABLE]:
        raise OptionError(
            f"disabled_passes={unknown}: no such pass can be left out; give some of {', '.join(DISABLEABLE)}"
        )
    return given


def _budget(value: float | None) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not 0 < value <= 1:
        raise OptionError(
            f"flops_budget={value!r} is no ratio: give a number with 0 < flops_budget <= 1, such as 0.74 (1.0 applies the "
            f"exact passes alone)"
        )
    return float(value)


def _schedule(value: Any) -> str | Schedule | tuple[int, ...]:
    if isinstance(value, str):
        if value not in SCHEDULES:
            names = ", ".join(map(repr, SCHEDULES))
            raise OptionError(f"schedule={value!r} is unknown; give one of {names}, or tokens per block, [8, 8, …]")
        return value
    if isinstance(value, Schedule):
        return value
    if not isinstance(value, Sequence):
        raise OptionError(f"schedule={value!r}: give 'auto', 'uniform', 'even', a Schedule, or a sequence of integers")
    if any(isinstance(count, bool) or not isinstance(count, int) or count < 0 for count in value):
        raise OptionError(f"schedule={list(value)}: every entry counts tokens, an integer of 0 or more")
    return tuple(value)
