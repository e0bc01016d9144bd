"""Options that commands share: their types for Typer, with what --help says of them."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from gtp_fx.cli import completion
from gtp_fx.options.options import HELP


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
