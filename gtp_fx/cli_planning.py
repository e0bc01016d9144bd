"""The commands that look ahead: `gtp-fx inspect` says what the compiler sees in a model, `gtp-fx plan` what a budget would do to it,
`gtp-fx tune` measures what that rests on."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gtp_fx.config import Options
from gtp_fx.errors import OptionError
from gtp_fx.reading import (
    AsJson,
    Batch,
    Dtype,
    FlopsBudgets,
    LatencyBudgets,
    Model,
    ScheduleText,
    Strategy,
    Targets,
    asked,
    budgets,
    explaining,
)

if TYPE_CHECKING:
    from gtp_fx.forecast import Forecast


def inspect(
    model: Model,
    as_json: AsJson = False,
) -> None:
    """Print what the compiler sees in MODEL: attention blocks, their tokens, what can be done at each, what can't and why.

    The model is built without its weights, and nothing is rewritten.
    """
    from gtp_fx.inspection import inspect_model
    from gtp_fx.sources import named_on_meta

    with explaining():
        found = inspect_model(named_on_meta(model))
    typer.echo(json.dumps({"model": model, **found.to_dict()}, indent=2) if as_json else f"{model} {found}")


def plan(
    model: Model,
    flops_budget: FlopsBudgets = None,
    latency_budget: LatencyBudgets = None,
    target: Targets = None,
    schedule: ScheduleText = "auto",
    strategy: Strategy = "gtp",
    batch: Batch = 8,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.float32,
    plot: Annotated[
        Path | None, typer.Option(help="Draw tokens per block, for every budget and target, to this PNG.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Write the schedule to this JSON; one budget and one target only.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print what a budget would do to MODEL: where tokens leave, FLOPs and predicted time of every block. Nothing is compiled.

    The model is built without its weights, so even large ones take seconds.
    """
    from gtp_fx.plotting import must_draw, must_have_folder, plot_tokens

    with explaining():
        asked_for = itertools.product(target or ["auto"], budgets(flops_budget, latency_budget, schedule))
        options = [
            Options.of(**asked(*budget, schedule, strategy, processor, batch)) for processor, budget in asked_for
        ]
        if save is not None and len(options) != 1:
            raise OptionError(
                f"--save keeps one schedule, and {len(options)} were asked for: give one budget and one target"
            )
        must_draw(plot)
        must_have_folder(save)
        forecasts = _forecasts(model, dtype, options)
        if plot is not None:
            plot_tokens(forecasts, model, plot)
        if save is not None:
            save.write_text(forecasts[0].schedule.to_json() + "\n")
    if as_json:
        typer.echo(json.dumps({"model": model, "plans": [found.to_dict() for found in forecasts]}, indent=2))
        return
    typer.echo("\n\n".join([model, *map(str, forecasts)]))
    for file in filter(None, (plot, save)):
        typer.echo(f"\nwritten: {file}")


def tune(
    device: Annotated[str, typer.Option(help="cpu or cuda; auto is the GPU where there is one.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Of products and attention.")] = Dtype.float32,
    rounds: Annotated[int, typer.Option(help="Rounds of timing, each runs every probe once.")] = 9,
    as_json: AsJson = False,
) -> None:
    """Measure this machine's rates, a minute or two of small kernels, and keep them: predictions then rest on them. On a GPU, kernels' tiles too."""
    import torch

    from gtp_fx import tuning
    from gtp_fx.kernels.available import has_kernels
    from gtp_fx.progress import progress_bar
    from gtp_fx.targets import listed
    from gtp_fx.targets.tuned import as_dict, save_tuned

    with explaining():
        if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
            raise OptionError(f"--device {device}: give cpu, cuda (where torch finds a GPU) or auto")
        if rounds < 1:
            raise OptionError(f"--rounds {rounds}: give at least one")
        with progress_bar() as show:
            if has_kernels(torch.device(listed(device).device)):  # first: the curves are those of the tiles chosen
                tuning.tune_kernels(torch.device("cuda"), getattr(torch, dtype.value), rounds, show)
            tuned = tuning.tune(listed(device), getattr(torch, dtype.value), rounds, show)
        file = save_tuned(tuned)
    if as_json:
        typer.echo(json.dumps(as_dict(tuned), indent=2))
        return
    typer.echo(tuning.describe(tuned))
    typer.echo(f"\nkept in {file}; delete it to go back to the table's figures")


def _forecasts(model: str, dtype: Dtype, wanted: list[Options]) -> list[Forecast]:
    import torch

    from gtp_fx.planner import Planner
    from gtp_fx.sources import named_on_meta

    built = named_on_meta(model).to(getattr(torch, dtype.value))
    planner = Planner(built)
    return [planner.plan(options) for options in wanted]
