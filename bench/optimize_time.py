"""How long `optimize` takes beside the capture it is built on: torch.export alone, and optimize(compile=False).

    python -m bench.optimize_time --model deit_base_patch16_224 --out bench/results/x.json

What is left above torch.export is typing, planning, rewriting and verifying. Interleaved, after one warm-up of each:
torch.export's first call in a process also imports and initialises.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer

import gtp_fx
from bench.environment import Environment
from bench.output import publish
from gtp_fx.capture.inputs import call_signature
from gtp_fx.cli.weights import load_model
from gtp_fx.errors import GtpError
from gtp_fx.measure.timing import interleave

EXPORT, OPTIMIZE = "torch.export", "optimize"


def main(
    model: Annotated[str, typer.Option(help="timm's name.")] = "deit_base_patch16_224",
    budget: Annotated[float, typer.Option(help="FLOPs after / before at most, in (0, 1].")] = 0.74,
    rounds: Annotated[int, typer.Option(help="Rounds, each runs both once.")] = 10,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
) -> None:
    """Time torch.export alone and gtp_fx.optimize(compile=False), and print (or write) the result as JSON."""
    try:
        loaded = load_model(model)
        signature = call_signature(loaded.model, None)
        dynamic = [{0: torch.export.Dim.DYNAMIC} for _ in signature.args]
        timings = interleave(
            {
                EXPORT: lambda: torch.export.export(loaded.model, signature.args, dynamic_shapes=dynamic),
                OPTIMIZE: lambda: gtp_fx.optimize(loaded.model, flops_budget=budget, compile=False),
            },
            rounds=rounds,
        )
    except GtpError as error:
        typer.echo(f"optimize_time: {error}", err=True)
        raise typer.Exit(2) from error
    # How many times longer optimize takes: the speed-up of export over it.
    longer = timings.speed_up(EXPORT, OPTIMIZE)
    typer.echo(
        f"optimize takes {longer.median:.2f} times torch.export's {timings.spread(EXPORT).median:.2f} s", err=True
    )
    result = {
        "bench": "optimize_time",
        "model": loaded.name,
        "flops_budget": budget,
        "environment": asdict(Environment.here("cpu")),
        "rounds": rounds,
        "seconds": timings.to_dict(),
        "times_export": asdict(longer),
    }
    publish(result, out)


if __name__ == "__main__":
    typer.run(main)
