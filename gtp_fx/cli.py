"""The command line, `gtp-fx`. What it prints goes to stdout, progress and errors to stderr.

Exit codes: 0, 1 where a check found a wrong output, 2 for something the caller can change.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import gtp_fx
from gtp_fx import cli_making, cli_planning
from gtp_fx.errors import OptionError
from gtp_fx.reading import (
    AsJson,
    Batch,
    Device,
    Dtype,
    FlopsBudget,
    LatencyBudget,
    Mode,
    Model,
    Pretrained,
    Rounds,
    ScheduleText,
    Strategy,
    Target,
    Weights,
    asked,
    explaining,
    load,
)

if TYPE_CHECKING:
    from torch import Tensor

    from gtp_fx.compare import Agreement, Comparison
    from gtp_fx.loading import LoadedModel
    from gtp_fx.model import OptimizedModel

app = typer.Typer(
    help="Make pre-trained vision transformers faster by graph-based token propagation.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
main = app


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"gtp-fx {gtp_fx.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Its options stand before the subcommand."""


_root.__doc__ = app.info.help
app.command()(cli_planning.inspect)
app.command()(cli_planning.plan)
app.command()(cli_planning.tune)
app.command()(cli_making.bench)
app.command()(cli_making.export)
app.command()(cli_making.show)


@app.command()
def optimize(
    model: Model,
    flops_budget: FlopsBudget = None,
    latency_budget: LatencyBudget = None,
    schedule: ScheduleText = "auto",
    strategy: Strategy = "gtp",
    target: Target = "auto",
    mode: Mode = None,
    batch: Batch = 8,
    rounds: Rounds = 15,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.float32,
    device: Annotated[Device, typer.Option()] = Device.cpu,
    weights: Weights = None,
    pretrained: Pretrained = False,
    no_time: Annotated[bool, typer.Option("--no-time", help="Optimise and check; compile and time nothing.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw tokens and predicted time per block to this PNG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Optimise MODEL, check it on a photograph, and time it against the original, eager and compiled."""
    from gtp_fx.compare import agreement
    from gtp_fx.photo import photo_batch
    from gtp_fx.plotting import must_draw

    def say(text: str) -> None:
        if not as_json:
            typer.echo(text)

    with explaining(model):
        if rounds < 1:
            raise OptionError(f"--rounds {rounds}: give at least one")
        if mode is not None and no_time:
            raise OptionError(f"--mode {mode} is how to compile, and --no-time compiles nothing: leave one of them out")
        options = asked(flops_budget, latency_budget, schedule, strategy, target, batch, mode)
        must_draw(plot)
        loaded = load(model, pretrained, weights, dtype, device)
        say(f"{loaded.name}, weights: {loaded.weights_origin}; {dtype.value} on {device.value}\n")
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
    from gtp_fx.compare import compare
    from gtp_fx.progress import progress_bar

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


if __name__ == "__main__":
    main()
