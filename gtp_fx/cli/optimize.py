"""`gtp-fx optimize`: optimise a model, check it on a photograph, time it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import gtp_fx
from gtp_fx.cli.arguments import (
    AsJson,
    Batch,
    Calibration,
    Device,
    Dtype,
    FlopsBudget,
    ImgSize,
    LatencyBudget,
    Mode,
    Model,
    ModelArgs,
    NumClasses,
    Pretrained,
    Rounds,
    ScheduleText,
    Strategy,
    Target,
    Weights,
    WeightsKey,
    built_with,
    explaining,
    load,
    option_values,
)
from gtp_fx.errors import OptionError
from gtp_fx.options.options import DEFAULTS, Options

if TYPE_CHECKING:
    from torch import Tensor

    from gtp_fx.cli.weights import LoadedModel
    from gtp_fx.measure.compare import Agreement, Comparison
    from gtp_fx.model.optimized_model import OptimizedModel


def optimize(
    model: Model,
    flops_budget: FlopsBudget = DEFAULTS["flops_budget"],
    latency_budget: LatencyBudget = DEFAULTS["latency_budget"],
    schedule: ScheduleText = DEFAULTS["schedule"],
    strategy: Strategy = DEFAULTS["strategy"],
    calibration: Calibration = None,
    target: Target = DEFAULTS["target"],
    mode: Mode = DEFAULTS["mode"],
    batch: Batch = DEFAULTS["batch"],
    rounds: Rounds = 15,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.float32,
    device: Annotated[Device, typer.Option()] = Device.cpu,
    weights: Weights = None,
    weights_key: WeightsKey = None,
    pretrained: Pretrained = False,
    num_classes: NumClasses = None,
    img_size: ImgSize = None,
    model_arg: ModelArgs = None,
    no_time: Annotated[bool, typer.Option("--no-time", help="Optimise and check; compile and time nothing.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw tokens and predicted time per block to this PNG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Optimise MODEL, check it on a photograph, and time it against the original, eager and compiled."""
    from gtp_fx.cli.photo import photo_batch, pictures_in, prepared_batch
    from gtp_fx.measure.compare import agreement
    from gtp_fx.report.plots import must_draw

    def say(text: str) -> None:
        if not as_json:
            typer.echo(text)

    with explaining(model):
        if rounds < 1:
            raise OptionError(f"--rounds {rounds}: give at least one")
        if mode is not None and no_time:
            raise OptionError(f"--mode {mode} is how to compile, but --no-time compiles nothing: leave one of them out")
        options = option_values(flops_budget, latency_budget, schedule, strategy, target, batch, mode)
        pictures = None if calibration is None else pictures_in(calibration)
        Options.of(**options, calibration=pictures)  # before the model is loaded: do they go together?
        must_draw(plot)
        arguments = built_with(num_classes, img_size, model_arg)
        loaded = load(model, arguments, pretrained, weights, weights_key, dtype, device)
        say(f"{loaded.name}, weights: {loaded.weights_origin}; {dtype.value} on {device.value}\n")
        if pictures is not None:
            options["calibration"] = prepared_batch(loaded.model, pictures)
        fast = gtp_fx.optimize(loaded.model, **options)
        say(f"{fast.report}\n")
        if plot is not None:
            fast.report.plot(plot)
            say(f"written: {plot}\n")
        images = photo_batch(loaded.model, batch)
        agreed = agreement(loaded.model, fast, images)
        say(f"checked: {agreed}\n")
        comparison = None if no_time else _compare(loaded, fast, images, rounds)
    if comparison is not None:
        furthest = max(done.error for done in comparison.compilations.values())
        say(f"checked: compiled within {furthest:.1e} of eager (tolerance {comparison.tolerance:.0e})\n\n{comparison}")
    if as_json:
        typer.echo(json.dumps(_as_dict(loaded, fast, comparison, agreed, dtype, device), indent=2))


def _compare(loaded: LoadedModel, fast: OptimizedModel, images: Tensor, rounds: int) -> Comparison:
    from gtp_fx.measure.compare import compare
    from gtp_fx.options.progress import progress_bar

    with progress_bar() as show:
        return compare(loaded.model, fast, images, rounds=rounds, progress=show)


def _as_dict(
    loaded: LoadedModel,
    fast: OptimizedModel,
    comparison: Comparison | None,
    agreed: Agreement,
    dtype: Dtype,
    device: Device,
) -> dict[str, Any]:
    return {
        "model": loaded.name,
        "weights": loaded.weights_origin,
        "dtype": dtype.value,
        "device": device.value,
        "report": fast.report.to_dict(),
        "schedule": json.loads(fast.schedule.to_json()),
        "agreement": asdict(agreed),
        "comparison": None if comparison is None else comparison.to_dict(),
    }
