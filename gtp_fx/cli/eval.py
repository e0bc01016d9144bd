"""`gtp-fx eval`: accuracy or agreement on a folder of images, beside time and memory, by budget and strategy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from gtp_fx.cli.arguments import AsJson, Eager, Mode, Model, NoTiming, Rounds
from gtp_fx.cli.endings import explaining
from gtp_fx.cli.files import Overwrite
from gtp_fx.cli.groups import Makings, Placed, grouped
from gtp_fx.cli.typed import parse_latency
from gtp_fx.errors import OptionError
from gtp_fx.options.options import DEFAULTS


@grouped
def evaluate(
    model: Model,
    data: Annotated[Path, typer.Option(help="A folder of images, or of one folder for each class.")],
    makings: Makings,
    source: Placed,
    class_map: Annotated[
        Path | None, typer.Option(help="File with the class folders' names, one a line, in the outputs' order.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use at most this many images, evenly spaced.")] = None,
    compare: Annotated[str, typer.Option(help="What of the outputs is compared: auto, classes or features.")] = "auto",
    mode: Mode = DEFAULTS["mode"],
    batch: Annotated[int, typer.Option(help="Images per run.")] = 32,
    rounds: Rounds = 15,
    workers: Annotated[int, typer.Option(help="Processes that load images.")] = 0,
    eager: Eager = False,
    no_timing: NoTiming = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for table, JSON and picture; rows of the same evaluation in it aren't measured again."
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Compare MODEL with its optimised forms on a folder of images: accuracy or agreement, time and memory."""
    from gtp_fx.measure.evaluation.evaluate import evaluate as measured
    from gtp_fx.report.text import wrapped

    with explaining(model):
        if mode is not None and (eager or no_timing):
            raise OptionError(f"--mode {mode} is how to compile, and nothing is compiled: leave one of them out")
        chosen = next(iter(makings.checked(batch, mode).values()))  # all have the same images and schedule
        if not data.is_dir():
            raise OptionError(f"--data {data} is no folder: give one of images, or of class folders")
        if out is not None and out.exists() and not out.is_dir():
            raise OptionError(f"--out {out} is a file: give a folder for the results")
        loaded = source.placed(model)
        images = chosen.images(loaded.model)
        calibration: dict[str, Any] = {} if images is None else {"calibration": images}
        found = measured(
            loaded.model,
            data,
            budgets=makings.flops_budget or (),
            latency_budgets=[parse_latency(text) for text in makings.latency_budget or ()],
            strategies=makings.strategies,
            schedule=chosen.values["schedule"],
            **calibration,
            class_map=class_map,
            limit=limit,
            compare=compare,
            target=makings.target,
            mode=mode,
            batch=batch,
            rounds=rounds,
            workers=workers,
            eager=eager,
            timing=not no_timing,
            out=out,
            overwrite=overwrite,
            progress=True,
            name=f"{loaded.name}, weights: {loaded.weights_origin}",
        )
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        typer.echo(str(found))
        if out is not None:
            files = ", ".join(str(file) for file in sorted(out.glob("evaluation.*")))
            typer.echo("\n" + wrapped(f"written: {files}"))
    if all(row.sums is None for row in found.rows):
        raise typer.Exit(1)  # nothing could be made of the model, as the output says
