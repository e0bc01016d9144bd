"""What was typed as options, read: schedules, budgets, what a model is built with, options of `gtp_fx.optimize`."""

from __future__ import annotations

import json
from typing import Any

from gtp_fx.errors import OptionError
from gtp_fx.options.options import DEFAULTS, Options
from gtp_fx.options.schedule import Schedule


def parse_schedule(text: str) -> str | tuple[int, ...] | Schedule:
    """Return a schedule's name, unchecked, its counts ("8,8,8" gives (8, 8, 8)), or the Schedule in a .json file.

    Raises OptionError for an unreadable file or other text, and ScheduleError where the file holds no schedule.
    """
    if text.isalpha():
        return text
    if text.endswith(".json"):
        return Schedule.from_file(text)
    try:
        return tuple(int(entry) for entry in text.split(","))
    except ValueError:
        raise OptionError(
            f"--schedule {text!r} is neither auto, uniform, even nor a list of counts; give the tokens removed at each "
            f"attention block, such as 8,8,8, or a file that ends in .json"
        ) from None


def built_with(num_classes: int | None, img_size: str | None, others: list[str] | None) -> dict[str, Any]:
    """Return the arguments that a model is built with, by timm's names.

    others: as typed, KEY=VALUE. Values are JSON or Python's True, False and None, and text where they are neither.

    Raises OptionError where one isn't of that form, or is given twice.
    """
    found: dict[str, Any] = {}
    if num_classes is not None:
        if num_classes < 0:
            raise OptionError(f"--num-classes {num_classes}: give the classes of the head, or 0 for none")
        found["num_classes"] = num_classes
    if img_size is not None:
        sides = [int(side) for side in img_size.split("x") if side.isdecimal() and int(side)]
        if len(sides) != img_size.count("x") + 1 or len(sides) > 2:
            raise OptionError(f"--img-size {img_size}: give a side in pixels, 384, or height and width, 384x256")
        found["img_size"] = sides[0] if len(sides) == 1 else tuple(sides)
    for typed in others or []:
        key, equals, value = typed.partition("=")
        if not equals or not key.isidentifier():
            raise OptionError(f"--model-arg {typed}: give a name and a value, such as depth=6")
        if key in found:
            raise OptionError(f"--model-arg {typed}: {key} is given twice")
        found[key] = _value(value)
    return found


def _value(text: str) -> Any:
    """Return what was typed as JSON, as one of Python's three constants, or as text."""
    constants = {"True": True, "False": False, "None": None}
    try:
        return constants[text] if text in constants else json.loads(text)
    except json.JSONDecodeError:
        return text


def parse_latency(text: str) -> float | str:
    """Return a ratio as a float, and anything else unchanged and unchecked."""
    try:
        return float(text)
    except ValueError:
        return text


def budgets(
    flops: list[float] | None, latencies: list[str] | None, schedule: str
) -> list[tuple[float | None, str | None]]:
    """Return the given budgets as pairs (FLOPs, latency), of which one is None.

    A schedule that gives counts needs no budget; the pair is then (None, None). Raises OptionError where another
    schedule has no budget.
    """
    found: list[tuple[float | None, str | None]] = [(ratio, None) for ratio in flops or []]
    found += [(None, text) for text in latencies or []]
    if not found and isinstance(parse_schedule(schedule), str):
        raise OptionError("no budget: give --flops-budget 0.74 or --latency-budget 0.74, or counts with --schedule")
    return found or [(None, None)]


def option_values(
    flops: float | None,
    latency: str | None,
    schedule: str,
    strategy: str,
    target: str,
    batch: int,
    mode: str | None = None,
    output: str = DEFAULTS["output"],
) -> dict[str, Any]:
    """Return the keyword arguments for `gtp_fx.optimize`.

    Raises OptionError where one is wrong, before any model is downloaded.
    """
    if flops is None and latency is None:
        budgets(None, None, schedule)
    found: dict[str, Any] = {
        "flops_budget": flops,
        "latency_budget": None if latency is None else parse_latency(latency),
        "batch": batch,
        "schedule": parse_schedule(schedule),
        "strategy": strategy,
        "target": target,
        "mode": mode,
        "output": output,
    }
    Options.of(**found)
    return found
