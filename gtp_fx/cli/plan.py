"""`gtp-fx plan`: print what a budget would do to a model."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gtp_fx.cli.arguments import (
    AsJson,
    Batch,
    Dtype,
    FlopsBudgets,
    LatencyBudgets,
    Model,
    Output,
    ScheduleText,
    Strategies,
    Targets,
)
from gtp_fx.cli.endings import explaining
from gtp_fx.cli.files import Overwrite, SaveSchedule, may_write, write_schedule
from gtp_fx.cli.groups import Build, grouped, tell_of_auto
from gtp_fx.cli.typed import budgets, option_values
from gtp_fx.errors import OptionError
from gtp_fx.options.options import DEFAULTS, Options

if TYPE_CHECKING:
    from gtp_fx.report.forecast import Forecast


@grouped
def plan(
    model: Model,
    build: Build,
    flops_budget: FlopsBudgets = None,
    latency_budget: LatencyBudgets = None,
    target: Targets = None,
    schedule: ScheduleText = DEFAULTS["schedule"],
    strategy: Strategies = None,
    output: Output = DEFAULTS["output"],
    batch: Batch = DEFAULTS["batch"],
    dtype: Annotated[Dtype, typer.Option()] = Dtype.float32,
    plot: Annotated[
        Path | None, typer.Option(help="Draw tokens per block, for every budget, target and strategy, to this PNG.")
    ] = None,
    save_schedule: SaveSchedule = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Print what a budget would do to MODEL: the removed tokens, FLOPs and predicted time of every block.

    Nothing is compiled. The model is built without its weights, so even a large one takes seconds.
    """
    from gtp_fx.cli.weights import with_arguments
    from gtp_fx.report.plots import plot_tokens

    with explaining():
        strategies = strategy or [DEFAULTS["strategy"]]
        wanted = itertools.product(target or ["auto"], budgets(flops_budget, latency_budget, schedule), strategies)
        options = [
            Options.of(**option_values(*budget, schedule, name, processor, batch, output=output))
            for processor, budget, name in wanted
        ]
        if save_schedule is not None and len(options) != 1:
            raise OptionError(
                f"--save-schedule keeps one schedule, but {len(options)} were asked for: give one budget, one target "
                f"and one strategy"
            )
        tell_of_auto(strategies, "`gtp-fx optimize MODEL --calibration FOLDER` chooses one")
        may_write(plot, overwrite, "--plot", drawn=True)
        may_write(save_schedule, overwrite, "--save-schedule")
        arguments = build.arguments
        forecasts = _forecasts(model, arguments, dtype, options)
        name = with_arguments(model, arguments)
        if plot is not None:
            plot_tokens(forecasts, name, plot)
        if save_schedule is not None:
            write_schedule(forecasts[0].schedule, save_schedule)
    if as_json:
        typer.echo(json.dumps({"model": name, "plans": [found.to_dict() for found in forecasts]}, indent=2))
        return
    typer.echo("\n\n".join([name, *map(str, forecasts)]))
    for file in filter(None, (plot, save_schedule)):
        typer.echo(f"\nwritten: {file}")


def _forecasts(model: str, arguments: dict[str, Any], dtype: Dtype, wanted: list[Options]) -> list[Forecast]:
    """Return the forecast for each of `wanted`, from one capture of the model on the meta device."""
    import torch

    from gtp_fx.cli.models import named_on_meta
    from gtp_fx.model.planner import Planner

    built = named_on_meta(model, arguments).to(getattr(torch, dtype.value))
    planner = Planner(built)
    return [planner.plan(options) for options in wanted]
