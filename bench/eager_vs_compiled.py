"""Benchmark: speed-up of an optimised model, eager against eager and compiled against compiled.

    python -m bench.eager_vs_compiled --model deit_small_patch16_224 --batch 8 --budget 0.74 --out bench/results/x.json

It runs from a checkout, installed or not. The baseline is the strongest one: the same model under torch.compile, with
torch's fused attention. All contenders are timed interleaved in one run (`gtp_fx.measure.timing`), so that a machine's
noise affects all of them alike. Weights are random unless given: they don't affect time, and no result is on accuracy.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import gtp_fx
from bench.environment import Environment
from bench.output import publish
from gtp_fx.cli.arguments import Device, Dtype
from gtp_fx.cli.photo import photo_batch
from gtp_fx.cli.typed import parse_schedule
from gtp_fx.cli.weights import LoadedModel, load_model
from gtp_fx.errors import CheckError, GtpError
from gtp_fx.measure.compare import Comparison, compare
from gtp_fx.measure.timing import model_clock
from gtp_fx.options.progress import progress_bar


def main(
    model: Annotated[str, typer.Option(help="timm's name.")] = "deit_small_patch16_224",
    batch: Annotated[int, typer.Option(help="Images per run.")] = 8,
    budget: Annotated[float | None, typer.Option(help="FLOPs after / before at most, in (0, 1].")] = 0.74,
    schedule: Annotated[str, typer.Option(help="auto, uniform, or removed tokens per block: 8,8,8,…")] = "auto",
    dtype: Annotated[Dtype, typer.Option()] = Dtype.float32,
    device: Annotated[Device, typer.Option()] = Device.cpu,
    rounds: Annotated[int, typer.Option(help="Rounds of timing, each runs every contender once.")] = 30,
    weights: Annotated[str | None, typer.Option(help="File of weights: safetensors or a torch state dict.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
) -> None:
    """Time a model and its optimised form, eager and compiled, and print (or write) the result as JSON."""
    try:
        loaded = load_model(model, weights=weights)
        loaded.model.to(device.value, getattr(torch, dtype.value))
        fast = gtp_fx.optimize(loaded.model, flops_budget=budget, schedule=parse_schedule(schedule))
        images = photo_batch(loaded.model, batch)
        with progress_bar() as show:
            comparison = compare(loaded.model, fast, images, rounds=rounds, progress=show)
    except (GtpError, CheckError) as error:
        typer.echo(f"eager_vs_compiled: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, GtpError) else 1) from error
    result = as_result(loaded, fast, comparison, dtype.value, device.value)
    typer.echo(f"{comparison}\n{Environment.here(device.value)}", err=True)
    publish(result, out)


def as_result(
    loaded: LoadedModel, fast: gtp_fx.OptimizedModel, comparison: Comparison, dtype: str, device: str
) -> dict[str, Any]:
    """Return the result file's content: what ran, where, and what was measured."""
    return {
        "bench": "eager_vs_compiled",
        "model": loaded.name,
        "weights": loaded.weights_origin,
        "dtype": dtype,
        "device": device,
        "batch": comparison.batch,
        "flops_budget": fast.report.flops_budget,
        "schedule": list(fast.schedule),
        "environment": asdict(Environment.here(device)),
        "clock": model_clock(torch.device(device)).__name__,
        "comparison": comparison.to_dict(),
    }


if __name__ == "__main__":
    typer.run(main)
