"""Shared parts of the commands: their options, the reading of what the user typed, and the handling of errors."""

from __future__ import annotations

import contextlib
import json
import traceback
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from gtp_fx.cli import completion
from gtp_fx.errors import CheckError, GtpError, InternalError, OptionError
from gtp_fx.options.options import DEFAULTS, HELP, Options
from gtp_fx.options.schedule import Schedule

if TYPE_CHECKING:
    from gtp_fx.cli.weights import LoadedModel


class Dtype(str, Enum):
    """Dtypes that the command line offers."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Device(str, Enum):
    """Devices that the command line offers."""

    cpu = "cpu"
    cuda = "cuda"


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="timm's name (deit_small_patch16_224), a Hugging Face directory, name or class "
        "(ViTForImageClassification), or package.module:factory.",
        autocompletion=completion.models,
    ),
]
_REPEATED = " May be repeated."
FlopsBudget = Annotated[float | None, typer.Option(help=HELP["flops_budget"])]
FlopsBudgets = Annotated[list[float] | None, typer.Option(metavar="<float>", help=HELP["flops_budget"] + _REPEATED)]
LatencyBudget = Annotated[str | None, typer.Option(help=HELP["latency_budget"])]
LatencyBudgets = Annotated[list[str] | None, typer.Option(metavar="<str>", help=HELP["latency_budget"] + _REPEATED)]
ScheduleText = Annotated[
    str,
    typer.Option(
        help=HELP["schedule"] + " Counts are written 8,8,8.",
        autocompletion=completion.schedules,
    ),
]
_STRATEGY = (
    f"Which tokens are removed, and what becomes of them: {', '.join(completion.STRATEGIES)}; with values as in "
    "'gtp(alpha=0.2)'."
)
Strategy = Annotated[str, typer.Option(help=_STRATEGY, autocompletion=completion.strategies)]
Strategies = Annotated[
    list[str] | None,
    typer.Option(metavar="<str>", help=_STRATEGY + _REPEATED, autocompletion=completion.strategies),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        help="Folder of photographs, without labels: 64 of them choose the schedule, and the strategy if that is auto."
    ),
]
Target = Annotated[str, typer.Option(help=HELP["target"], autocompletion=completion.targets)]
Targets = Annotated[
    list[str] | None,
    typer.Option(metavar="<str>", help=HELP["target"] + _REPEATED, autocompletion=completion.targets),
]
Mode = Annotated[str | None, typer.Option(help=HELP["mode"], autocompletion=completion.modes)]
Output = Annotated[str, typer.Option(help=HELP["output"], autocompletion=completion.outputs)]
Batch = Annotated[int, typer.Option(help="Images per run.")]
Rounds = Annotated[int, typer.Option(help="Rounds of timing; each runs every contender once.")]
Weights = Annotated[str | None, typer.Option(help="File of weights: safetensors, or a torch checkpoint.")]
WeightsKey = Annotated[
    str | None,
    typer.Option(
        help="Entry of the checkpoint that holds the weights. Default: averaged weights (state_dict_ema, model_ema) "
        "where there are some, else state_dict or model."
    ),
]
NumClasses = Annotated[int | None, typer.Option(help="Number of classes, where it isn't the default of MODEL.")]
ImgSize = Annotated[str | None, typer.Option(help="Side of the images, 384, or height and width, 384x256.")]
ModelArgs = Annotated[
    list[str] | None,
    typer.Option(
        "--model-arg",
        metavar="KEY=VALUE",
        help="An argument that the model is built with: timm's, a field of transformers' configuration, or the "
        "factory's; the value is JSON, or else text." + _REPEATED,
    ),
]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Download the model's weights.")]
NoTiming = Annotated[bool, typer.Option("--no-timing", help="Compile and time nothing.")]
Eager = Annotated[bool, typer.Option("--eager", help="Compile nothing: eager against eager.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else to stdout.")]


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


def load(
    name: str,
    arguments: dict[str, Any],
    pretrained: bool,
    weights: str | None,
    weights_key: str | None,
    dtype: Dtype,
    device: Device,
) -> LoadedModel:
    """Load a model onto a device in a dtype. Raises OptionError where there is no GPU, and LoadError."""
    import torch

    from gtp_fx.cli.models import load_named

    if device is Device.cuda and not torch.cuda.is_available():
        raise OptionError("--device cuda: torch finds no GPU here; give --device cpu")
    loaded = load_named(name, pretrained=pretrained, weights=weights, weights_key=weights_key, built_with=arguments)
    loaded.model.to(device.value, getattr(torch, dtype.value))
    return loaded


@contextlib.contextmanager
def explaining(model: str = "") -> Iterator[None]:
    """End the command with the message alone for errors that the user can fix, and for wrong outputs.

    Any other error is a fault of gtp_fx: its message follows its traceback.

    model: name that precedes the message of a CheckError.
    """
    from gtp_fx.model.internal_errors import internal_errors_reported

    try:
        with internal_errors_reported():
            yield
    except InternalError as error:
        traceback.print_exception(error.__cause__)
        _fail(str(error), 3)
    except GtpError as error:
        _fail(str(error), 2)
    except CheckError as error:
        _fail(f"{model}: {error}", 1)
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}", 2)


def say_aside(message: str) -> None:
    """Print a message to stderr, wrapped for the terminal."""
    from gtp_fx.report.text import wrapped

    typer.echo(wrapped(message), err=True)


def _fail(message: str, code: int) -> NoReturn:
    say_aside(f"gtp-fx: {message}")
    raise typer.Exit(code)
