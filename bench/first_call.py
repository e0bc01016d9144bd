"""How long the first call takes, and what sharing code between sections costs every call after it.

    python -m bench.first_call --model deit_small_patch16_224 --batch 8 --out bench/results/x.json

Each contender's first call is made in a process and with compilers' caches of its own, with one compile thread; its
time is the processor's, the C++ compiler's included. Something else is compiled before, so that importing Inductor
isn't counted. Then all are compiled once more in one process, and their runs are interleaved.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tabulate import tabulate
from torch import Tensor

import gtp_fx
from bench.environment import Environment
from bench.output import publish
from gtp_fx.cli.photo import photo_batch
from gtp_fx.cli.weights import load_model
from gtp_fx.errors import GtpError
from gtp_fx.measure.timing import interleave, process_seconds

ORIGINAL, STATIC, SHARED = CONTENDERS = ("original", "static", "shared")


def main(
    model: Annotated[str, typer.Option(help="timm's name.")] = "deit_small_patch16_224",
    batch: Annotated[int, typer.Option(help="Images per run.")] = 8,
    budget: Annotated[float, typer.Option(help="FLOPs after / before at most, in (0, 1].")] = 0.74,
    schedule: Annotated[str, typer.Option(help="auto, uniform or even.")] = "auto",
    strategy: Annotated[str, typer.Option(help="A strategy's name.")] = "regeneration",
    rounds: Annotated[int, typer.Option(help="Rounds of timing, each runs every contender once; 0 for none.")] = 30,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    only: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Print (or write) each contender's first call and its runs."""
    torch.set_num_threads(1)
    if only is not None:
        typer.echo(json.dumps(_first_call(only, model, batch, budget, schedule, strategy)))
        return
    asked = ["--model", model, "--batch", batch, "--budget", budget, "--schedule", schedule, "--strategy", strategy]
    try:
        first = {name: _in_a_process([*map(str, asked), "--only", name]) for name in CONTENDERS}
        timings = None if rounds == 0 else _runs(model, batch, budget, schedule, strategy, rounds)
    except GtpError as error:
        typer.echo(f"first_call: {error}", err=True)
        raise typer.Exit(2) from error
    rows = []
    for name in CONTENDERS:
        seconds, kernels = first[name]["seconds"], first[name]["kernels"]
        row = [name, f"{seconds:.1f}", f"{seconds / first[ORIGINAL]['seconds']:.2f}", kernels]
        if timings is not None:
            row += [f"{1e3 * timings.spread(name).median:.1f}", f"{timings.speed_up(name, STATIC).median:.3f}"]
        rows.append(row)
    headers = ["", "first call, s", "of the original's", "kernels", "run, ms", "times faster than static"]
    typer.echo(tabulate(rows, headers[: len(rows[0])], disable_numparse=True), err=True)
    result = {
        "bench": "first_call",
        "model": model,
        "batch": batch,
        "flops_budget": budget,
        "schedule": schedule,
        "strategy": strategy,
        "environment": asdict(Environment.here("cpu")),
        "first_call": first,
        "rounds": rounds,
        "runs": None if timings is None else timings.to_dict(),
    }
    publish(result, out)


def _contender(name: str, model: Any, images: Tensor, options: dict[str, Any]) -> Callable[[Tensor], Any]:
    """Return the model by a contender's name, to be compiled at its first call."""
    if name == ORIGINAL:
        compiled: Callable[[Tensor], Any] = torch.compile(model)
        return compiled
    return gtp_fx.optimize(model, example_inputs=images[:1], shapes=name, **options)


@torch.no_grad()
def _first_call(name: str, model: str, batch: int, budget: float, schedule: str, strategy: str) -> dict[str, Any]:
    """Return processor seconds of a contender's first call, and how many C++ kernels were compiled in it."""
    loaded = load_model(model).model
    images = photo_batch(loaded, batch)
    options = {"flops_budget": budget, "schedule": schedule, "strategy": strategy}
    run = _contender(name, loaded, images, options)
    torch.compile(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU()))(torch.randn(4, 8))
    kernels, before = _kernels(), _processor_seconds()
    run(images)
    return {"seconds": _processor_seconds() - before, "kernels": _kernels() - kernels}


def _in_a_process(arguments: list[str]) -> dict[str, Any]:
    """Run this bench for one contender, with empty caches and one compile thread."""
    with tempfile.TemporaryDirectory() as cache:
        settings = {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "bench.first_call", *arguments]
        done = subprocess.run(command, env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@torch.no_grad()
def _runs(model: str, batch: int, budget: float, schedule: str, strategy: str, rounds: int) -> Any:
    """Return the timings of all contenders' runs, interleaved in one process, by its own clock."""
    loaded = load_model(model).model
    images = photo_batch(loaded, batch)
    options = {"flops_budget": budget, "schedule": schedule, "strategy": strategy}
    runs = {name: _contender(name, loaded, images, options) for name in CONTENDERS}
    for run in runs.values():
        run(images)
    return interleave(
        {name: lambda run=run: run(images) for name, run in runs.items()},  # type: ignore[misc]
        rounds=rounds,
        clock=process_seconds,
    )


def _processor_seconds() -> float:
    """Return the processor's time of this process and of those that it waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _kernels() -> int:
    """Return how many C++ files Inductor has written."""
    return len(list(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).rglob("*.cpp")))


if __name__ == "__main__":
    typer.run(main)
