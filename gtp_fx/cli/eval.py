"""`gtp-fx eval`: accuracy or agreement on a folder of images, beside time and memory, by budget and strategy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from gtp_fx.cli.arguments import (
    AsJson,
    Device,
    Dtype,
    FlopsBudgets,
    ImgSize,
    LatencyBudgets,
    Mode,
    Model,
    ModelArgs,
    NumClasses,
    Pretrained,
    Rounds,
    ScheduleText,
    Strategies,
    Target,
    Weights,
    WeightsKey,
    budgets,
    built_with,
    explaining,
    load,
    parse_latency,
    parse_schedule,
    tell_of_auto,
)
from gtp_fx.errors import OptionError
from gtp_fx.options.options import DEFAULTS


def evaluate(
    model: Model,
    data: Annotated[Path, typer.Option(help="A folder of images, or of one folder for each class.")],
    flops_budget: FlopsBudgets = None,
    latency_budget: LatencyBudgets = None,
    strategy: Strategies = None,
    schedule: ScheduleText = DEFAULTS["schedule"],
    out: Annotated[
        Path | None, typer.Option(help="Folder for table, JSON and picture; rows in it aren't measured again.")
    ] = None,
    class_map: Annotated[
        Path | None, typer.Option(help="File with the class folders' names, one a line, in the outputs' order.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use at most this many images, evenly spaced.")] = None,
    outputs: Annotated[str, typer.Option(help="What the outputs are: auto, classes or features.")] = "auto",
    target: Target = DEFAULTS["target"],
    mode: Mode = DEFAULTS["mode"],
    batch: Annotated[int, typer.Option(help="Images per run.")] = 32,
    rounds: Rounds = 15,
    workers: Annotated[int, typer.Option(help="Processes that load images.")] = 0,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.float32,
    device: Annotated[Device, typer.Option()] = Device.cpu,
    weights: Weights = None,
    weights_key: WeightsKey = None,
    pretrained: Pretrained = False,
    num_classes: NumClasses = None,
    img_size: ImgSize = None,
    model_arg: ModelArgs = None,
    eager: Annotated[bool, typer.Option("--eager", help="Compile nothing: eager against eager.")] = False,
    no_timing: Annotated[bool, typer.Option("--no-timing", help="Compile and time nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare MODEL with its optimised forms on a folder of images: accuracy or agreement, time and memory."""
    from gtp_fx.measure.evaluation.evaluate import evaluate as measured

    with explaining(model):
        budgets(flops_budget, latency_budget, schedule)
        if mode is not None and (eager or no_timing):
            raise OptionError(f"--mode {mode} is how to compile, and nothing is compiled: leave one of them out")
        if not data.is_dir():
            raise OptionError(f"--data {data} is no folder: give one of images, or of class folders")
        tell_of_auto(strategy or ())
        arguments = built_with(num_classes, img_size, model_arg)
        loaded = load(model, arguments, pretrained, weights, weights_key, dtype, device)
        found = measured(
            loaded.model,
            data,
            budgets=flops_budget or (),
            latency_budgets=[parse_latency(text) for text in latency_budget or ()],
            strategies=strategy or [DEFAULTS["strategy"]],
            schedule=parse_schedule(schedule),
            class_map=class_map,
            limit=limit,
            outputs=outputs,
            target=target,
            mode=mode,
            batch=batch,
            rounds=rounds,
            workers=workers,
            eager=eager,
            timing=not no_timing,
            out=out,
            progress=True,
            name=f"{loaded.name}, weights: {loaded.weights_origin}",
        )
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
        return
    typer.echo(str(found))
    if out is not None:
        typer.echo(f"\nwritten: {', '.join(str(file) for file in sorted(out.glob('evaluation.*')))}")
