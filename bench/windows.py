"""Windowed nets and pyramids: what part of the FLOPs that are saved is saved in time, by each way to save them.

    python -m bench.windows --model swin_tiny_patch4_window7_224 --batch 4 --out x.json

Compiled against compiled on one CPU thread, by its own clock, in interleaved rounds. The share is (1 - time after /
before) / (1 - FLOPs after / before); in "beyond exact" both are counted from the model with the exact passes alone,
which may fuse an attention that the original has written out. What is predicted are times faster, by this machine's
rates where `gtp-fx tune` has measured them.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from tabulate import tabulate
from torch import nn
from transformers import VitDetBackbone, VitDetConfig

import gtp_fx
from bench.environment import Environment
from bench.live_weights import enliven
from bench.output import publish
from gtp_fx.errors import GtpError
from gtp_fx.measure.timing import Timings, interleave, process_seconds
from gtp_fx.strategies import Regeneration

ORIGINAL, EXACT = "original", "exact passes"
VITDET = "vitdet_base"
STRATEGIES = {"tokens skip": Regeneration(windows="skip"), "windows rest": Regeneration(windows="rest")}


def main(
    model: Annotated[str, typer.Option(help="timm's name, or vitdet_base.")] = "swin_tiny_patch4_window7_224",
    img_size: Annotated[int | None, typer.Option(help="Side of the images in pixels; the model's own.")] = None,
    batch: Annotated[int, typer.Option(help="Images per run.")] = 4,
    budget: Annotated[float, typer.Option(help="FLOPs after / before at most, in (0, 1).")] = 0.8,
    rounds: Annotated[int, typer.Option(help="Rounds of timing; each runs every contender once.")] = 30,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
) -> None:
    """Print (or write) the time of a net's two reductions, each with its FLOPs."""
    torch.set_num_threads(1)
    net, side = _built(model, img_size)
    images = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    runs: dict[str, Any] = {ORIGINAL: torch.compile(net)}
    ratios, sites, refused, predicted = {ORIGINAL: 1.0}, {}, {}, {}
    asked: dict[str, dict[str, Any]] = {EXACT: {"flops_budget": 1.0}}
    asked |= {name: {"flops_budget": budget, "strategy": strategy} for name, strategy in STRATEGIES.items()}
    for name, options in asked.items():
        try:
            runs[name] = gtp_fx.optimize(net, example_inputs=images[:1], batch=batch, **options)
        except GtpError as error:
            refused[name] = str(error)
            typer.echo(f"{name}: {error}", err=True)
            continue
        report = runs[name].report
        ratios[name], sites[name] = report.flops_ratio, [asdict(site) for site in report.sites]
        if report.forecast is not None:
            predicted[name] = report.forecast.speed_up
    timings = _timed(runs, images, rounds)
    rows = [_row(name, timings, ratios, predicted) for name in runs]
    headers = ["", "FLOPs", "ms", "times faster (quartiles)", "share", "beyond exact", "predicted"]
    typer.echo(tabulate(rows, headers, disable_numparse=True), err=True)
    result = {
        "bench": "windows",
        "model": model,
        "img_size": side,
        "batch": batch,
        "flops_budget": budget,
        "weights": "random",
        "environment": asdict(Environment.here("cpu")),
        "flops_ratios": ratios,
        "sites": sites,
        "refused": refused,
        "predicted_speed_up": predicted,
        "rounds": rounds,
        "runs": timings.to_dict(),
    }
    publish(result, out)


def _built(model: str, img_size: int | None) -> tuple[nn.Module, int]:
    """Return a net with random weights that show mistakes, and the side of its images."""
    if model == VITDET:
        side = img_size or 512
        # Numbers of ViT-B, windows and global blocks as published: 14 x 14, each third block global.
        windowed = [block for block in range(12) if block % 3 != 2]
        positions = {"use_relative_position_embeddings": True, "pretrain_image_size": 224}
        config = VitDetConfig(image_size=side, window_size=14, window_block_indices=windowed, **positions)
        return enliven(VitDetBackbone(config)).eval().requires_grad_(False), side
    net = enliven(timm.create_model(model, **({} if img_size is None else {"img_size": img_size})))
    return net.eval().requires_grad_(False), img_size or net.pretrained_cfg["input_size"][-1]


@torch.no_grad()
def _timed(runs: dict[str, Any], images: torch.Tensor, rounds: int) -> Timings:
    """Return interleaved timings of the contenders, compiled before."""
    for run in runs.values():
        run(images)
    callables = {name: lambda run=run: run(images) for name, run in runs.items()}  # type: ignore[misc]
    return interleave(callables, rounds=rounds, clock=process_seconds)


def _row(name: str, timings: Timings, ratios: dict[str, float], predicted: dict[str, float]) -> list[str]:
    """Return a contender's line of the table."""
    faster = timings.speed_up(name, ORIGINAL)
    spread = f"{faster.median:.2f} ({faster.lower:.2f} – {faster.upper:.2f})"
    shares = [_share(name, base, timings, ratios) for base in (ORIGINAL, EXACT)]
    expected = f"{predicted[name]:.2f}" if name in predicted else ""
    return [name, f"{ratios[name]:.3f}", f"{1e3 * timings.spread(name).median:.1f}", spread, *shares, expected]


def _share(name: str, base: str, timings: Timings, ratios: dict[str, float]) -> str:
    """Return the saving in time over that in FLOPs, both counted from `base`; "" where no FLOPs are saved."""
    if base not in ratios or ratios[name] >= 0.995 * ratios[base]:
        return ""
    time = 1 / timings.speed_up(name, base).median
    return f"{(1 - time) / (1 - ratios[name] / ratios[base]):.2f}"


if __name__ == "__main__":
    typer.run(main)
