"""`gtp-fx export`: optimise a model and write it to a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import gtp_fx
from gtp_fx.cli.arguments import AsJson, Model, Output
from gtp_fx.cli.endings import explaining
from gtp_fx.cli.files import Overwrite, SaveSchedule, may_write, write_schedule
from gtp_fx.cli.groups import Making, Placed, grouped
from gtp_fx.errors import OptionError, did_you_mean
from gtp_fx.options.options import DEFAULTS


@grouped
def export(
    model: Model,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What to write: x.pt2, x.onnx or x.cache.")],
    making: Making,
    source: Placed,
    output: Output = DEFAULTS["output"],
    format: Annotated[
        str | None,
        typer.Option(help="torch, aoti, onnx or cache. Default: by the file's suffix, where .pt2 means torch."),
    ] = None,
    save_schedule: SaveSchedule = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Optimise MODEL and write it for any batch size, as a torch.export program, an AOTInductor package or ONNX.

    Or write what torch compiles of it, for other processes on such a machine: the format cache.

    The file is read back and run as a check.
    """
    from gtp_fx.model.exporting.files import FORMATS, format_of
    from gtp_fx.report.text import wrapped

    with explaining(model):
        if format is not None and format not in FORMATS:
            raise OptionError(f"--format {format}: give {', '.join(FORMATS)}{did_you_mean(format, FORMATS)}")
        chosen = making.checked(output=output)
        format_of(file, format)
        may_write(file, overwrite)
        may_write(save_schedule, overwrite, "--save-schedule")
        loaded = source.placed(model)
        fast = gtp_fx.optimize(loaded.model, **chosen.options(loaded.model), compile=False)
        written = gtp_fx.export(fast, file, format, progress=True)
        if save_schedule is not None:
            write_schedule(fast.schedule, save_schedule)
    if as_json:
        about: dict[str, Any] = {"model": loaded.name, "weights": loaded.weights_origin, "dtype": source.dtype.value}
        done = {"exported": written.to_dict(), "schedule": json.loads(fast.schedule.to_json())}
        typer.echo(json.dumps({**about, **done, "report": fast.report.to_dict()}, indent=2))
        return
    about_it = f"{loaded.name}, weights: {loaded.weights_origin}; {fast.report.flops_ratio:.4f} of its FLOPs"
    typer.echo(wrapped(f"{about_it}\n{written}"))
    if save_schedule is not None:
        typer.echo(f"written: {save_schedule}")
