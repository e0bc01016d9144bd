"""Everything about a GPU in one command: are the kernels right, how fast are they, and how much faster are models?

    python -m bench.gpu --out bench/results/gpu_h200.json

Runs from a checkout with nothing installed but torch, timm, triton and what they bring. What is under way when `--minutes` are
over is finished, the rest is left out and named. The file is written after every row; with `--only` and `--model` a large
bench can be had in pieces. On a CPU, `--dry-run` runs all of it on toy sizes with Triton's interpreter: figures of that say nothing.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

import torch
import typer
from tabulate import tabulate

from bench.environment import Environment
from bench.gpu_checks import DRY, MODELS, Check, run_checks
from bench.gpu_kernels import KernelRow, time_kernels
from bench.gpu_models import DRY_SUBJECTS, SUBJECTS, ModelRow, time_models
from bench.output import publish
from gtp_fx.kernels.available import has_kernels, load_kernels
from gtp_fx.reading import Dtype
from gtp_fx.targets import detect

PARTS = ("checks", "kernels", "models")


@dataclass
class Result:
    """What was found so far."""

    checks: list[Check] = field(default_factory=list)
    kernels: list[KernelRow] = field(default_factory=list)
    models: list[ModelRow] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> list[Check]:
        return [check for check in self.checks if not check.right]

    def to_dict(self) -> dict[str, Any]:
        return {
            "checks": [{**asdict(check), "right": check.right} for check in self.checks],
            "kernels": [{**asdict(row), "reached": row.reached} for row in self.kernels],
            "models": [{**asdict(row), "of_saving": row.of_saving} for row in self.models],
            "left_out": self.left_out,
        }


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(PARTS)}; all where none is given.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Only these of the models.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Instead of each model's own batches.")] = None,
    mode: Annotated[list[str] | None, typer.Option(help='torch.compile\'s; "default" where none is given.')] = None,
    budget: Annotated[float, typer.Option(help="FLOPs after / before at most, in (0, 1].")] = 0.74,
    dtype: Annotated[Dtype, typer.Option(help="Of models and of kernels' timings.")] = Dtype.bfloat16,
    rounds: Annotated[int, typer.Option(help="Rounds of timing, each runs every contender once.")] = 15,
    minutes: Annotated[float, typer.Option(help="No row is begun later than this.")] = 7.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Toy sizes on the CPU, in Triton's interpreter.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the JSON to this file, after every row.")] = None,
) -> None:
    """Check the kernels, time them, time models, within a few minutes; a short table comes last."""
    device = torch.device("cpu" if dry_run else "cuda")
    parts = only or list(PARTS)
    if unknown := sorted(set(parts) - set(PARTS)):
        _fail(f"--only {', '.join(unknown)}: give {', '.join(PARTS)}")
    if not dry_run and not (torch.cuda.is_available() and has_kernels(device)):
        _fail("no GPU that the kernels are made for (NVIDIA, Ampere or later, with Triton); --dry-run needs none")
    subjects = [s for s in (DRY_SUBJECTS if dry_run else SUBJECTS) if not model or s.name in model]
    if not subjects:
        _fail(f"--model {', '.join(model or [])}: give some of {', '.join(s.name for s in SUBJECTS)}")
    load_kernels()
    torch_dtype: torch.dtype = getattr(torch, dtype.value)
    deadline = time.monotonic() + 60 * minutes
    result = Result()

    def keep() -> None:
        if out is not None:
            publish(_as_dict(result, dtype.value, device.type, dry_run, rounds, budget), out)

    if "checks" in parts:
        result.checks += run_checks(device, DRY if dry_run else MODELS)
        keep()
    if "kernels" in parts:
        timed = time_kernels(device, torch.float32 if dry_run else torch_dtype, rounds, small=dry_run)
        for kernel_row in _until(deadline, timed, result.left_out, "kernels"):
            result.kernels.append(kernel_row)
            keep()
    if "models" in parts:
        target = detect(device.type)
        model_dtype = torch.float32 if dry_run else torch_dtype
        rows = time_models(subjects, batch, mode or ["default"], budget, target, model_dtype, rounds)
        for row in _until(deadline, rows, result.left_out, "models"):
            if isinstance(row, str):
                result.left_out.append(row)
            else:
                result.models.append(row)
                typer.echo(f"{row.model} x{row.batch}: {row.speed_up:.3f}x", err=True)
            keep()
    typer.echo(table(result))
    typer.echo(f"{Environment.here(device.type)}{'; a dry run: no figure means anything' if dry_run else ''}")
    wrong_models = [row.model for row in result.models if not row.right(torch.float32 if dry_run else torch_dtype)]
    if result.wrong or wrong_models:
        raise typer.Exit(1)


def _until(deadline: float, rows: Iterator[Any], left_out: list[str], what: str) -> Iterator[Any]:
    """Rows that are begun before the deadline."""
    while time.monotonic() < deadline:
        try:
            yield next(rows)
        except StopIteration:
            return
    left_out.append(f"{what} behind the last row: time was over")


def table(result: Result) -> str:
    """For people: what is wrong, kernels, models, what is missing."""
    parts = []
    if result.checks:
        worst: dict[tuple[str, str], Check] = {}
        for check in result.checks:
            key = check.kernel, check.dtype
            if key not in worst or not check.error / max(check.tolerance, 1e-30) <= (
                worst[key].error / max(worst[key].tolerance, 1e-30)
            ):
                worst[key] = check
        lines = [
            [c.kernel, c.dtype, f"{c.error:.1e}", f"{c.tolerance:.1e}", "right" if c.right else f"WRONG at {c.case}"]
            for c in worst.values()
        ]
        parts.append(tabulate(lines, ["kernel", "dtype", "largest error", "tolerance", ""], disable_numparse=True))
    if result.kernels:
        lines = [
            [r.kernel, r.case, f"{r.seconds * 1e6:.1f}", f"{r.share:.2f} of {r.against}", f"{r.aim:.2f}"]
            for r in result.kernels
        ]
        parts.append(tabulate(lines, ["kernel", "sizes", "us", "", "aim"], disable_numparse=True))
    if result.models:
        lines = [_model_line(row) for row in result.models]
        headers = [
            "model",
            "batch",
            "FLOPs",
            "ms before",
            "ms after",
            "speed-up",
            "quartiles",
            "of saving",
            "predicted",
        ]
        parts.append(tabulate(lines, headers, disable_numparse=True))
    parts += [f"left out: {left}" for left in result.left_out]
    return "\n\n".join(parts)


def _model_line(row: ModelRow) -> Sequence[str]:
    before, after = row.best
    return [
        f"{row.model} @{row.side}",
        str(row.batch),
        f"{row.flops_ratio:.3f}",
        f"{row.seconds[before] * 1e3:.2f} ({before.split(' ', 1)[1]})",
        f"{row.seconds[after] * 1e3:.2f} ({after.split(' ', 1)[1]})",
        f"{row.speed_up:.3f}",
        f"{row.speed_up_quartiles[0]:.3f} – {row.speed_up_quartiles[1]:.3f}",
        f"{row.of_saving:.0%}",
        f"{row.predicted:.3f}",
    ]


def _as_dict(result: Result, dtype: str, device: str, dry_run: bool, rounds: int, budget: float) -> dict[str, Any]:
    return {
        "bench": "gpu",
        "dry_run": dry_run,
        "dtype": dtype,
        "device": device,
        "rounds": rounds,
        "flops_budget": budget,
        "weights": "random, spread out",
        "environment": asdict(Environment.here(device)),
        **result.to_dict(),
    }


def _fail(why: str) -> None:
    typer.echo(f"gpu: {why}", err=True)
    raise typer.Exit(2)


if __name__ == "__main__":
    typer.run(main)
