"""Is the chosen schedule truly faster than uniform counts? Both compiled, at one FLOPs budget, all in one run.

    python -m bench.schedule_times --model deit_small_patch16_224 --budget 0.74 --out bench/results/x.json

Uniform counts change FLOPs in steps of some per cent, so they undercut the budget. The other schedules get the FLOPs
of the last one as their budget, so that all have equal FLOPs.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tabulate import tabulate

import gtp_fx
from bench.environment import Environment
from bench.output import publish
from gtp_fx.cli.arguments import Device, Dtype
from gtp_fx.cli.photo import photo_batch
from gtp_fx.cli.weights import load_model
from gtp_fx.errors import GtpError
from gtp_fx.measure.timing import Run, clock_for, interleave

ORIGINAL = "original"


@torch.no_grad()
def main(
    model: Annotated[str, typer.Option(help="timm's name.")] = "deit_small_patch16_224",
    batch: Annotated[int, typer.Option(help="Images per run.")] = 8,
    budget: Annotated[float, typer.Option(help="FLOPs after / before at most, in (0, 1].")] = 0.74,
    schedule: Annotated[
        list[str] | None, typer.Option(help="Names to compare; auto and uniform where none is given.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.float32,
    device: Annotated[Device, typer.Option()] = Device.cpu,
    rounds: Annotated[int, typer.Option(help="Rounds of timing, each runs every contender once.")] = 30,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
) -> None:
    """Time the original and one optimised model a schedule, all compiled, interleaved."""
    names = schedule or ["auto", "uniform"]
    try:
        loaded = load_model(model)
        loaded.model.to(device.value, getattr(torch, dtype.value))
        last = gtp_fx.optimize(loaded.model, flops_budget=budget, schedule=names[-1])
        equal = last.report.flops_ratio
        made = {name: gtp_fx.optimize(loaded.model, flops_budget=equal, schedule=name) for name in names[:-1]}
        made[names[-1]] = last
        images = photo_batch(loaded.model, batch)
    except GtpError as error:
        typer.echo(f"schedule_times: {error}", err=True)
        raise typer.Exit(2) from error
    compiled: Any = torch.compile(loaded.model)
    runs: dict[str, Run] = {ORIGINAL: lambda: compiled(images)}
    runs |= {name: lambda fast=fast: fast(images) for name, fast in made.items()}  # type: ignore[misc]
    for run in runs.values():
        run()  # compiles
    timings = interleave(runs, rounds=rounds, warmup=2, clock=clock_for(images.device))
    rows = []
    for name, fast in made.items():
        gain, ratio = timings.speed_up(name, ORIGINAL), fast.report.flops_ratio
        rows.append(
            {
                "schedule": name,
                "counts": list(fast.schedule),
                "flops_ratio": ratio,
                "speed_up": asdict(gain),
                "share_of_limit": gain.median * ratio,
                "over_last": asdict(timings.speed_up(name, names[-1])),
            }
        )
    lines = [
        [
            row["schedule"],
            f"{row['flops_ratio']:.4f}",
            f"{row['speed_up']['median']:.3f}×",  # type: ignore[index]
            f"{row['speed_up']['lower']:.3f} – {row['speed_up']['upper']:.3f}",  # type: ignore[index]
            f"{row['share_of_limit']:.1%}",
            f"{row['over_last']['median']:.3f}×",  # type: ignore[index]
        ]
        for row in rows
    ]
    headers = ["schedule", "FLOPs", "speed-up", "quartiles", "of limit", f"over {names[-1]}"]
    typer.echo(f"{tabulate(lines, headers, disable_numparse=True)}\n{Environment.here(device.value)}", err=True)
    result = {
        "bench": "schedule_times",
        "model": loaded.name,
        "weights": loaded.weights_origin,
        "dtype": dtype.value,
        "device": device.value,
        "batch": batch,
        "flops_budget": budget,
        "rounds": rounds,
        "environment": asdict(Environment.here(device.value)),
        "rows": rows,
        "seconds": timings.to_dict(),
    }
    publish(result, out)


if __name__ == "__main__":
    typer.run(main)
