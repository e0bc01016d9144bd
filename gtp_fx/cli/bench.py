"""`gtp-fx bench`: print a table of times, by budget and strategy."""

from __future__ import annotations

import itertools
import json
from typing import Annotated

import typer

import gtp_fx
from gtp_fx.cli.arguments import (
    AsJson,
    Batch,
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
    option_values,
    tell_of_auto,
)
from gtp_fx.errors import OptionError
from gtp_fx.options.options import DEFAULTS


def bench(
    model: Model,
    flops_budget: FlopsBudgets = None,
    latency_budget: LatencyBudgets = None,
    strategy: Strategies = None,
    schedule: ScheduleText = DEFAULTS["schedule"],
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
    eager: Annotated[bool, typer.Option("--eager", help="Compile nothing: eager against eager.")] = False,
    as_json: AsJson = False,
) -> None:
    """Time MODEL against its optimised form for each budget and strategy, all compiled, interleaved in one run."""
    from gtp_fx.cli.photo import photo_batch
    from gtp_fx.measure.benchmark import benchmark
    from gtp_fx.options.progress import progress_bar

    with explaining(model):
        if rounds < 1:
            raise OptionError(f"--rounds {rounds}: give at least one")
        if mode is not None and eager:
            raise OptionError(f"--mode {mode} is how to compile, but --eager compiles nothing: leave one of them out")
        wanted = itertools.product(strategy or [DEFAULTS["strategy"]], budgets(flops_budget, latency_budget, schedule))
        options = {
            _named(how, *budget): option_values(*budget, schedule, how, target, batch, mode) for how, budget in wanted
        }
        tell_of_auto(strategy or ())
        arguments = built_with(num_classes, img_size, model_arg)
        loaded = load(model, arguments, pretrained, weights, weights_key, dtype, device)
        made = {name: gtp_fx.optimize(loaded.model, **chosen) for name, chosen in options.items()}
        images = photo_batch(loaded.model, batch)
        with progress_bar() as show:
            found = benchmark(loaded.model, made, images, rounds=rounds, eager=eager, progress=show)
    about = {"model": loaded.name, "weights": loaded.weights_origin, "dtype": dtype.value, "device": device.value}
    if as_json:
        typer.echo(
            json.dumps(
                {**about, "target": target, "mode": mode, "schedule": schedule, "benchmark": found.to_dict()}, indent=2
            )
        )
        return
    typer.echo(f"{loaded.name}, weights: {loaded.weights_origin}; {dtype.value} on {device.value}\n\n{found}")


def _named(strategy: str, flops: float | None, latency: str | None) -> str:
    """Return a contender's name: its strategy and budget."""
    budget = f" {flops:g} FLOPs" if flops is not None else f" {latency} time" if latency is not None else ""
    return strategy + budget
