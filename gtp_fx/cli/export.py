"""`gtp-fx export`: optimise a model and write it to a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import gtp_fx
from gtp_fx.cli.arguments import (
    AsJson,
    Batch,
    Device,
    Dtype,
    FlopsBudget,
    ImgSize,
    LatencyBudget,
    Model,
    ModelArgs,
    NumClasses,
    Output,
    Pretrained,
    ScheduleText,
    Strategy,
    Target,
    Weights,
    WeightsKey,
    built_with,
    explaining,
    load,
    option_values,
    tell_of_auto,
)
from gtp_fx.errors import OptionError
from gtp_fx.options.options import DEFAULTS


def export(
    model: Model,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What to write: x.pt2, x.onnx or x.cache.")],
    flops_budget: FlopsBudget = DEFAULTS["flops_budget"],
    latency_budget: LatencyBudget = DEFAULTS["latency_budget"],
    schedule: ScheduleText = DEFAULTS["schedule"],
    strategy: Strategy = DEFAULTS["strategy"],
    target: Target = DEFAULTS["target"],
    output: Output = DEFAULTS["output"],
    batch: Batch = DEFAULTS["batch"],
    format: Annotated[
        str | None,
        typer.Option(help="torch, aoti, onnx or cache. Default: by the file's suffix, where .pt2 means torch."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.float32,
    device: Annotated[Device, typer.Option()] = Device.cpu,
    weights: Weights = None,
    weights_key: WeightsKey = None,
    pretrained: Pretrained = False,
    num_classes: NumClasses = None,
    img_size: ImgSize = None,
    model_arg: ModelArgs = None,
    save_schedule: Annotated[
        Path | None,
        typer.Option(
            help="Also write the schedule to this JSON file, for --schedule. It doesn't hold the strategy: give the "
            "same --strategy again."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Optimise MODEL and write it for any batch size, as a torch.export program, an AOTInductor package or ONNX.

    Or write what torch compiles of it, for other processes on such a machine: the format cache.

    The file is read back and run as a check.
    """
    from gtp_fx.model.exporting.files import FORMATS, format_of
    from gtp_fx.report.plots import must_have_folder

    with explaining(model):
        if format is not None and format not in FORMATS:
            raise OptionError(f"--format {format}: give {', '.join(FORMATS)}")
        options = option_values(flops_budget, latency_budget, schedule, strategy, target, batch, output=output)
        tell_of_auto([strategy])
        format_of(file, format)
        must_have_folder(save_schedule)
        arguments = built_with(num_classes, img_size, model_arg)
        loaded = load(model, arguments, pretrained, weights, weights_key, dtype, device)
        fast = gtp_fx.optimize(loaded.model, **options, compile=False)
        written = gtp_fx.export(fast, file, format, progress=True)
        if save_schedule is not None:
            save_schedule.write_text(fast.schedule.to_json() + "\n")
    if as_json:
        about: dict[str, Any] = {"model": loaded.name, "weights": loaded.weights_origin, "dtype": dtype.value}
        done = {"exported": written.to_dict(), "schedule": json.loads(fast.schedule.to_json())}
        typer.echo(json.dumps({**about, **done, "report": fast.report.to_dict()}, indent=2))
        return
    typer.echo(
        f"{loaded.name}, weights: {loaded.weights_origin}; {fast.report.flops_ratio:.4f} of its FLOPs\n{written}"
    )
    if save_schedule is not None:
        typer.echo(f"written: {save_schedule}")
