"""`gtp-fx optimize`: optimise a model, check it on a photograph, time it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import gtp_fx
from gtp_fx.cli.arguments import AsJson, Mode, Model, NoTiming, Rounds
from gtp_fx.cli.endings import explaining
from gtp_fx.cli.files import Overwrite, SaveSchedule, may_write, write_schedule
from gtp_fx.cli.groups import Making, Placed, grouped
from gtp_fx.errors import OptionError
from gtp_fx.options.options import DEFAULTS

if TYPE_CHECKING:
    from torch import Tensor

    from gtp_fx.cli.weights import LoadedModel
    from gtp_fx.measure.compare import Agreement, Comparison
    from gtp_fx.model.optimized_model import OptimizedModel


@grouped
def optimize(
    model: Model,
    making: Making,
    source: Placed,
    mode: Mode = DEFAULTS["mode"],
    rounds: Rounds = 15,
    no_timing: NoTiming = False,
    plot: Annotated[Path | None, typer.Option(help="Draw tokens and predicted time per block to this PNG.")] = None,
    save_schedule: SaveSchedule = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Optimise MODEL, check it on a photograph, and time it against the original, eager and compiled."""
    from gtp_fx.cli.photo import photo_batch
    from gtp_fx.measure.compare import agreement
    from gtp_fx.report.text import wrapped

    def say(text: str) -> None:
        if not as_json:
            typer.echo(text)

    with explaining(model):
        if rounds < 1:
            raise OptionError(f"--rounds {rounds}: give at least one")
        if mode is not None and no_timing:
            raise OptionError(
                f"--mode {mode} is how to compile, but --no-timing compiles nothing: leave one of them out"
            )
        chosen = making.checked(mode=mode)
        may_write(plot, overwrite, "--plot", drawn=True)
        may_write(save_schedule, overwrite, "--save-schedule")
        loaded = source.placed(model)
        say(f"{wrapped(source.told(loaded))}\n")
        fast = gtp_fx.optimize(loaded.model, **chosen.options(loaded.model))
        say(f"{fast.report}\n")
        if plot is not None:
            fast.report.plot(plot)
            say(f"written: {plot}\n")
        if save_schedule is not None:
            write_schedule(fast.schedule, save_schedule)
            say(f"written: {save_schedule}\n")
        images = photo_batch(loaded.model, making.batch)
        agreed = agreement(loaded.model, fast, images)
        say(wrapped(f"checked: {agreed}") + "\n")
        comparison = None if no_timing else _compare(loaded, fast, images, rounds)
    if comparison is not None:
        furthest = max(done.error for done in comparison.compilations.values())
        say(f"checked: compiled within {furthest:.1e} of eager (tolerance {comparison.tolerance:.0e})\n\n{comparison}")
    if as_json:
        typer.echo(json.dumps(_as_dict(loaded, fast, comparison, agreed, source), indent=2))


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
    source: Placed,
) -> dict[str, Any]:
    return {
        "model": loaded.name,
        "weights": loaded.weights_origin,
        "dtype": source.dtype.value,
        "device": source.device.value,
        "report": fast.report.to_dict(),
        "schedule": json.loads(fast.schedule.to_json()),
        "agreement": asdict(agreed),
        "comparison": None if comparison is None else comparison.to_dict(),
    }
