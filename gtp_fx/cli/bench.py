"""`gtp-fx bench`: print a table of times, by budget and strategy."""

from __future__ import annotations

import json
from typing import Any

import typer

import gtp_fx
from gtp_fx.cli.arguments import AsJson, Batch, Eager, Mode, Model, Rounds
from gtp_fx.cli.endings import explaining
from gtp_fx.cli.groups import Makings, Placed, grouped
from gtp_fx.errors import OptionError
from gtp_fx.options.options import DEFAULTS


@grouped
def bench(
    model: Model,
    makings: Makings,
    source: Placed,
    batch: Batch = DEFAULTS["batch"],
    mode: Mode = DEFAULTS["mode"],
    rounds: Rounds = 15,
    eager: Eager = False,
    as_json: AsJson = False,
) -> None:
    """Time MODEL against its optimised form for each budget and strategy, all compiled, interleaved in one run."""
    from gtp_fx.cli.photo import photo_batch
    from gtp_fx.measure.benchmark import benchmark
    from gtp_fx.options.progress import progress_bar
    from gtp_fx.report.text import wrapped
    from gtp_fx.strategies.auto import chosen_by

    with explaining(model):
        if rounds < 1:
            raise OptionError(f"--rounds {rounds}: give at least one")
        if mode is not None and eager:
            raise OptionError(f"--mode {mode} is how to compile, but --eager compiles nothing: leave one of them out")
        wanted = makings.checked(batch, mode)
        loaded = source.placed(model)
        made = {}
        for (strategy, flops, latency), chosen in wanted.items():
            fast = gtp_fx.optimize(loaded.model, **chosen.options(loaded.model))
            chosen_name = chosen_by(strategy, fast.strategy)
            made[_named(strategy, flops, latency) + (f": {chosen_name}" if chosen_name else "")] = fast
        images = photo_batch(loaded.model, batch)
        with progress_bar() as show:
            found = benchmark(loaded.model, made, images, rounds=rounds, eager=eager, progress=show)
    if as_json:
        about: dict[str, Any] = {"model": loaded.name, "weights": loaded.weights_origin}
        about |= {"dtype": source.dtype.value, "device": source.device.value, "target": makings.target}
        about |= {"mode": mode, "schedule": makings.schedule}
        typer.echo(json.dumps({**about, "benchmark": found.to_dict()}, indent=2))
        return
    typer.echo(f"{wrapped(source.told(loaded))}\n\n{found}")


def _named(strategy: str, flops: float | None, latency: str | None) -> str:
    """Return a contender's name: its strategy and budget."""
    budget = f" {flops:g} FLOPs" if flops is not None else f" {latency} time" if latency is not None else ""
    return strategy + budget
