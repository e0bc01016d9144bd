"""The commands that make something of an optimised model: `gtp-fx bench` a table of times, `gtp-fx export` a file, `gtp-fx show` a picture."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import typer

import gtp_fx
from gtp_fx.errors import OptionError
from gtp_fx.exporting import FORMATS
from gtp_fx.exporting.files import format_of
from gtp_fx.plotting import must_have_folder
from gtp_fx.reading import (
    AsJson,
    Batch,
    Device,
    Dtype,
    FlopsBudget,
    FlopsBudgets,
    LatencyBudget,
    LatencyBudgets,
    Mode,
    Model,
    Pretrained,
    Rounds,
    ScheduleText,
    Strategies,
    Strategy,
    Target,
    Weights,
    asked,
    budgets,
    explaining,
    load,
)


def bench(
    model: Model,
    flops_budget: FlopsBudgets = None,
    latency_budget: LatencyBudgets = None,
    strategy: Strategies = None,
    schedule: ScheduleText = "auto",
    target: Target = "auto",
    mode: Mode = None,
    batch: Batch = 8,
    rounds: Rounds = 15,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.float32,
    device: Annotated[Device, typer.Option()] = Device.cpu,
    weights: Weights = None,
    pretrained: Pretrained = False,
    eager: Annotated[bool, typer.Option("--eager", help="Compile nothing: eager against eager.")] = False,
    as_json: AsJson = False,
) -> None:
    """Time MODEL against what each budget and strategy makes of it, compiled against compiled, interleaved in one run."""
    from gtp_fx.benchmark import benchmark
    from gtp_fx.photo import photo_batch
    from gtp_fx.progress import progress_bar

    with explaining(model):
        if rounds < 1:
            raise OptionError(f"--rounds {rounds}: give at least one")
        if mode is not None and eager:
            raise OptionError(f"--mode {mode} is how to compile, and --eager compiles nothing: leave one of them out")
        wanted = itertools.product(strategy or ["gtp"], budgets(flops_budget, latency_budget, schedule))
        options = {_named(how, *budget): asked(*budget, schedule, how, target, batch, mode) for how, budget in wanted}
        loaded = load(model, pretrained, weights, dtype, device)
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


def export(
    model: Model,
    file: Annotated[Path, typer.Argument(help="What to write: x.pt2 or x.onnx.")],
    flops_budget: FlopsBudget = None,
    latency_budget: LatencyBudget = None,
    schedule: ScheduleText = "auto",
    strategy: Strategy = "gtp",
    target: Target = "auto",
    batch: Batch = 8,
    format: Annotated[
        str | None,
        typer.Option(help="torch, aoti or onnx; by the file's suffix where left out, and .pt2 is then torch."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.float32,
    device: Annotated[Device, typer.Option()] = Device.cpu,
    weights: Weights = None,
    pretrained: Pretrained = False,
    save_schedule: Annotated[
        Path | None,
        typer.Option(help="Also write the schedule to this JSON, from which --schedule makes the same model again."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Optimise MODEL and write it for any batch: a torch.export program, an AOTInductor package or ONNX. Read back and run, too."""
    with explaining(model):
        if format is not None and format not in FORMATS:
            raise OptionError(f"--format {format}: give {', '.join(FORMATS)}")
        options = asked(flops_budget, latency_budget, schedule, strategy, target, batch)
        format_of(file, format)
        must_have_folder(save_schedule)
        loaded = load(model, pretrained, weights, dtype, device)
        fast = gtp_fx.optimize(loaded.model, **options, compile=False)
        written = gtp_fx.export(fast, file, format)
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


def show(
    model: Model,
    image: Annotated[
        Path | None, typer.Argument(help="A JPEG or PNG; a photograph of the package's where left out.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("tokens.png"),
    flops_budget: FlopsBudget = None,
    latency_budget: LatencyBudget = None,
    schedule: ScheduleText = "auto",
    strategy: Strategy = "gtp",
    target: Target = "auto",
    batch: Batch = 8,
    weights: Weights = None,
    pretrained: Pretrained = False,
    as_json: AsJson = False,
) -> None:
    """Draw IMAGE with what becomes of its tokens in MODEL: kept and leaving at each site, who receives them, and the token scales at the end; in
    models of windows, which skip at each site."""
    from gtp_fx.drawing import draw_journeys
    from gtp_fx.journeys import journeys
    from gtp_fx.photo import as_seen, load_photo, prepared, read_picture
    from gtp_fx.plotting import must_draw

    with explaining(model):
        options = asked(flops_budget, latency_budget, schedule, strategy, target, batch)
        must_draw(out)
        picture = load_photo() if image is None else read_picture(image)
        loaded = load(model, pretrained, weights, Dtype.float32, Device.cpu)
        fast = gtp_fx.optimize(loaded.model, **options, compile=False)
        pixels = prepared(loaded.model, picture)
        views = journeys(fast, pixels)
        title = (
            f"{loaded.name}, weights: {loaded.weights_origin}; {fast.report.flops_ratio:.3f} of its FLOPs, {strategy}"
        )
        draw_journeys(views, as_seen(loaded.model, pixels), title, out)
    if as_json:
        about = {"model": loaded.name, "weights": loaded.weights_origin, "picture": str(out)}
        typer.echo(json.dumps({**about, "sites": [view.to_dict() for view in views]}, indent=2))
        return
    typer.echo(f"{title}\nwritten: {out}")


def _named(strategy: str, flops: float | None, latency: str | None) -> str:
    asked_for = f" {flops:g} FLOPs" if flops is not None else f" {latency} time" if latency is not None else ""
    return strategy + asked_for
