"""Benchmark: speed-up of exported models, in onnxruntime and as AOTInductor packages.

python -m bench.export_times --model deit_small_patch16_224 --budget 0.74 --out bench/results/x.json
"""

from __future__ import annotations

import importlib
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tabulate import tabulate
from torch import Tensor, nn

import gtp_fx
from bench.environment import Environment
from bench.output import publish
from gtp_fx.cli.photo import photo_batch
from gtp_fx.cli.weights import load_model
from gtp_fx.errors import GtpError
from gtp_fx.measure.timing import Run, interleave

FORMATS = ("onnx", "aoti")


@torch.no_grad()
def main(
    model: Annotated[str, typer.Option(help="timm's name.")] = "deit_small_patch16_224",
    batch: Annotated[int, typer.Option(help="Images per run.")] = 8,
    budget: Annotated[float, typer.Option(help="FLOPs after / before at most, in (0, 1].")] = 0.74,
    rounds: Annotated[int, typer.Option(help="Rounds of timing, each runs every contender once.")] = 30,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
) -> None:
    """Export and time the original and the optimised model on the CPU, on torch's number of threads."""
    try:
        loaded = load_model(model)
        fast = gtp_fx.optimize(loaded.model, flops_budget=budget, compile=False)
        images = photo_batch(loaded.model, batch)
    except GtpError as error:
        typer.echo(f"export_times: {error}", err=True)
        raise typer.Exit(2) from error
    runs: dict[str, Run] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in FORMATS:
            runs[f"original, {kind}"] = _original(loaded.model, images, Path(folder), kind)
            file = Path(folder) / f"fast_{kind}{'.onnx' if kind == 'onnx' else '.pt2'}"
            gtp_fx.export(fast, file, kind)
            runs[f"optimised, {kind}"] = _runner(file, kind, images)
        timings = interleave(runs, rounds=rounds, warmup=2)
    ratio, rows = fast.report.flops_ratio, []
    for kind in FORMATS:
        gain = timings.speed_up(f"optimised, {kind}", f"original, {kind}")
        rows.append({"format": kind, "speed_up": asdict(gain), "share_of_limit": gain.median * ratio})
    lines = [
        [
            kind,
            *(f"{timings.spread(f'{who}, {kind}').median * 1e3:.1f}" for who in ("original", "optimised")),
            f"{row['speed_up']['median']:.3f}×",
            f"{row['share_of_limit']:.1%}",
        ]  # type: ignore[index]
        for kind, row in zip(FORMATS, rows, strict=True)
    ]
    typer.echo(
        tabulate(lines, ["format", "original, ms", "optimised, ms", "speed-up", "of limit"], disable_numparse=True),
        err=True,
    )
    about: dict[str, Any] = {
        "bench": "export_times",
        "model": loaded.name,
        "batch": batch,
        "rounds": rounds,
        "flops_ratio": ratio,
    }
    about |= {
        "counts": list(fast.schedule),
        "environment": asdict(Environment.here("cpu")),
        "rows": rows,
        "seconds": timings.to_dict(),
    }
    publish(about, out)


def _original(model: nn.Module, images: Tensor, folder: Path, kind: str) -> Run:
    """Export the original for any batch size, and return a function that runs it on `images`."""
    program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    file = folder / f"original_{kind}{'.onnx' if kind == 'onnx' else '.pt2'}"
    if kind == "onnx":
        made: Any = torch.onnx.export(program, (images[:2],), dynamo=True, verbose=False)
        made.save(str(file))
    else:
        importlib.import_module("torch._inductor").aoti_compile_and_package(program, package_path=str(file))
    return _runner(file, kind, images)


def _runner(file: Path, kind: str, images: Tensor) -> Run:
    """Return a function that runs an exported file on `images`."""
    if kind == "aoti":
        package = importlib.import_module("torch._inductor").aoti_load_package(str(file))
        return lambda: package(images)
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, given)


if __name__ == "__main__":
    typer.run(main)
