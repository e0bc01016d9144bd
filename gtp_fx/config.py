"""What a user asks for, validated before anything is touched. One value for both doors, `optimize` and the backend."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from gtp_fx.errors import OptionError
from gtp_fx.schedule import Schedule
from gtp_fx.scheduling import PRIORS
from gtp_fx.strategies import Strategy, strategy_named
from gtp_fx.targets import Target, target_named


@dataclass(frozen=True)
class Options:
    """Validated options.

    flops_budget: strict upper bound on FLOPs(result) / FLOPs(original), in (0, 1]; None where the schedule decides.
    schedule: "auto", "uniform", a Schedule, or tokens that leave in each attention block.
    dead_tokens: drop tokens that no output depends on (exact).
    """

    flops_budget: float | None
    schedule: str | Schedule | tuple[int, ...]
    strategy: Strategy
    target: Target
    dead_tokens: bool

    @classmethod
    def of(
        cls,
        flops_budget: float | None = None,
        schedule: str | Schedule | Sequence[int] = "auto",
        strategy: str | Strategy = "gtp",
        target: str | Target = "auto",
        dead_tokens: bool = True,
    ) -> Options:
        """Options from what a user wrote. Raises OptionError with the bad value and the good ones."""
        if not isinstance(dead_tokens, bool):
            raise OptionError(f"dead_tokens={dead_tokens!r}: give True or False")
        checked = _schedule(schedule)
        budget = _budget(flops_budget)
        if budget is None and isinstance(checked, str):
            raise OptionError(
                f"schedule={checked!r} needs a budget: give flops_budget=0.74 (a ratio in (0, 1]), or name the tokens that "
                f"leave in each attention block, schedule=[8, 8, …]"
            )
        return cls(budget, checked, strategy_named(strategy), target_named(target), dead_tokens)

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> Options:
        """Options of `torch.compile(backend="gtp", options={…})`: the same names as `optimize`'s."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise OptionError(f"unknown option {', '.join(map(repr, unknown))}; the backend knows {', '.join(known)}")
        return cls.of(**options)


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
        if value not in PRIORS:
            names = ", ".join(map(repr, PRIORS))
            raise OptionError(f"schedule={value!r} is unknown; give one of {names}, or tokens per block, [8, 8, …]")
        return value
    if isinstance(value, Schedule):
        return value
    if not isinstance(value, Sequence):
        raise OptionError(f"schedule={value!r}: give 'auto', 'uniform', a Schedule, or a sequence of integers")
    if any(isinstance(count, bool) or not isinstance(count, int) or count < 0 for count in value):
        raise OptionError(f"schedule={list(value)}: every entry counts tokens, an integer of 0 or more")
    return tuple(value)
