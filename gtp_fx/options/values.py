"""Values of options, checked: for each option a function of its name, which takes what the user wrote.

It returns the value that the code works with, or raises OptionError with the bad value, the accepted ones and what to
do. Checks that need torch import it by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gtp_fx.errors import OptionError, did_you_mean
from gtp_fx.options.calibration import Calibration
from gtp_fx.options.latency_budget import LatencyBudget
from gtp_fx.options.schedule import SCHEDULES, Schedule
from gtp_fx.targets import Target, target_named

if TYPE_CHECKING:
    from gtp_fx.strategies import Auto, Strategy

SHAPES = ("auto", "static", "shared")
"""How sizes are compiled; see `Options.shapes`."""

FULL, REDUCED = "full", "reduced"
OUTPUTS = (FULL, REDUCED)
"""How maps of tokens are returned; see `Options.output`."""


def flops_budget(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not 0 < value <= 1:
        raise OptionError(
            f"flops_budget={value!r} is no ratio: give a number with 0 < flops_budget <= 1, such as 0.74 (1.0 applies "
            f"only the exact passes)"
        )
    return float(value)


def latency_budget(value: Any) -> LatencyBudget | None:
    return None if value is None else LatencyBudget.of(value)


def batch(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"batch={value!r}: give the images of a run, an integer of at least 1")
    return value


def strict(value: Any) -> bool:
    if not isinstance(value, bool):
        raise OptionError(f"strict={value!r}: give True or False")
    return value


def shapes(value: Any) -> str:
    if value not in SHAPES:
        raise OptionError(f"shapes={value!r} is unknown; give one of {', '.join(map(repr, SHAPES))}")
    return str(value)


def output(value: Any) -> str:
    if value not in OUTPUTS:
        raise OptionError(f"output={value!r} is unknown; give one of {', '.join(map(repr, OUTPUTS))}")
    return str(value)


def schedule(value: Any) -> str | Schedule | tuple[int, ...]:
    if isinstance(value, Path) or (isinstance(value, str) and value.endswith(".json")):
        return Schedule.from_file(value)
    if isinstance(value, str):
        if value not in SCHEDULES:
            names = ", ".join(map(repr, SCHEDULES))
            raise OptionError(
                f"schedule={value!r} is unknown; give one of {names}, tokens per block, [8, 8, …], or a file, 'x.json'"
                f"{did_you_mean(value, SCHEDULES)}"
            )
        return value
    if isinstance(value, Schedule):
        return value
    if not isinstance(value, Sequence):
        raise OptionError(
            f"schedule={value!r}: give 'auto', 'uniform', 'even', a Schedule, its JSON file, or a sequence of integers"
        )
    if any(isinstance(count, bool) or not isinstance(count, int) or count < 0 for count in value):
        raise OptionError(f"schedule={list(value)}: every entry counts tokens, an integer of 0 or more")
    return tuple(value)


def prefix_tokens(value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise OptionError(f"prefix_tokens={value!r}: give the tokens before the patches, an integer of 0 or more")
    return value


def strategy(value: Any) -> Strategy | Auto:
    from gtp_fx.strategies import Auto, strategy_named

    if isinstance(value, str) and value == Auto.name:
        return Auto()
    return value if isinstance(value, Auto) else strategy_named(value)


def mode(value: Any) -> str | None:
    from gtp_fx.options.inductor import checked_mode

    return checked_mode(value)


def target(value: Any) -> Target:
    from gtp_fx.options.inductor import check_target

    found = target_named(value)
    check_target(found)
    return found


def disabled_passes(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def dump_graphs(value: Any) -> str | None:
    return None if value is None else str(value)


def calibration(value: Any) -> Calibration | None:
    return None if value is None else Calibration.of(value)
