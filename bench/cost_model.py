"""Benchmark: predicted against measured speed-up, over models and budgets, on this machine.

    gtp-fx tune && python -m bench.cost_model --out bench/results/cost_model_cpu.json \\
        --plot bench/results/cost_model_cpu.png

Original and optimised model are both compiled, and timed interleaved. The speed-up is what counts: errors that both
models share cancel in it. The absolute time's error is reported too. Rows are written one by one. Rows that --out
has already from the same curves aren't measured again.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from tabulate import tabulate
from torch import nn

import gtp_fx
from bench.environment import Environment
from bench.live_weights import enliven
from bench.output import publish
from gtp_fx.cli.arguments import Device, Dtype
from gtp_fx.measure.timing import Spread, clock_for, interleave
from gtp_fx.model.planner import Planner
from gtp_fx.options.options import Options
from gtp_fx.report.forecast import Forecast
from gtp_fx.targets import Target, detect


@dataclass(frozen=True)
class Subject:
    """A model to time.

    name: timm's name.
    side: side of its images, in pixels.
    batch: images per run on a CPU.
    gpu_batch: images per run on a GPU.
    made_with: arguments of `timm.create_model`.
    """

    name: str
    side: int
    batch: int
    gpu_batch: int
    made_with: Mapping[str, Any]

    def build(self) -> nn.Module:
        """Return the model in eval mode, with random weights."""
        model: nn.Module = timm.create_model(self.name, **self.made_with)
        return enliven(model).eval()


SUBJECTS = (
    Subject("deit_small_patch16_224", 224, 4, 256, {"depth": 4}),
    Subject("deit_base_patch16_224", 224, 2, 256, {"depth": 3}),
    Subject("vit_base_patch32_224", 224, 8, 256, {"depth": 4}),
    Subject("vit_small_patch16_224", 320, 2, 64, {"depth": 4, "img_size": 320}),
    Subject("eva02_tiny_patch14_224", 224, 4, 256, {"depth": 4}),
    Subject("swin_tiny_patch4_window7_224", 224, 4, 128, {"depths": (1, 1, 2, 1)}),
)
"""Models cut to a few blocks of full width: compiling a dozen blocks takes minutes, and tells no more than a few."""
BUDGETS = (0.8, 0.65, 0.5)


@dataclass(frozen=True)
class Row:
    """Result of one model at one budget.

    model: timm's name.
    side: side of its images, in pixels.
    batch: images per run.
    flops_budget: FLOPs budget, as a share of the original's.
    flops_ratio: FLOPs of the optimised model / the original's.
    schedule: removed tokens at each attention block.
    predicted: predicted speed-up.
    measured: measured speed-up, median over rounds.
    measured_quartiles: lower and upper quartile of the measured speed-up.
    predicted_seconds: predicted time per run, of the original and the optimised model.
    measured_seconds: measured time per run, likewise.
    """

    model: str
    side: int
    batch: int
    flops_budget: float
    flops_ratio: float
    schedule: tuple[int, ...]
    predicted: float
    measured: float
    measured_quartiles: tuple[float, float]
    predicted_seconds: tuple[float, float]
    measured_seconds: tuple[float, float]

    @property
    def error(self) -> float:
        """Return the relative error of the predicted speed-up."""
        return self.predicted / self.measured - 1


def main(
    rounds: Annotated[int, typer.Option(help="Rounds of timing; each runs both models once.")] = 15,
    model: Annotated[list[str] | None, typer.Option(help="Only these of the models.")] = None,
    budget: Annotated[list[float] | None, typer.Option(help="Instead of 0.8, 0.65 and 0.5.")] = None,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.float32,
    device: Annotated[Device, typer.Option()] = Device.cpu,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw predicted against measured to this PNG.")] = None,
) -> None:
    """Time models and their optimised forms, and compare the cost model's predictions with the measured speed-ups."""
    target = detect(device.value)
    if not target.measured:
        typer.echo("cost_model: nothing is known of this machine yet: run `gtp-fx tune` first", err=True)
        raise typer.Exit(2)
    rows = _known(out, target)
    subjects = [subject for subject in SUBJECTS if not model or subject.name in model]
    for row in _measure(subjects, budget or list(BUDGETS), rows, target, rounds, dtype.value, device.value):
        rows.append(row)
        typer.echo(
            f"{row.model} at {row.flops_budget:g}: {row.predicted:.3f} predicted, {row.measured:.3f} measured", err=True
        )
        publish_rows(rows, target, dtype.value, device.value, rounds, out)
    typer.echo(table(rows), err=out is None)
    if plot is not None:
        draw(rows, target, plot)


def _measure(
    subjects: Sequence[Subject],
    budgets: Sequence[float],
    known: Sequence[Row],
    target: Target,
    rounds: int,
    dtype: str,
    device: str,
) -> Iterator[Row]:
    """Yield the row of each subject and budget that isn't in `known`."""
    for subject in subjects:
        missing = [b for b in budgets if not any((row.model, row.flops_budget) == (subject.name, b) for row in known)]
        if not missing:
            continue
        model = subject.build().to(device, getattr(torch, dtype))
        batch = subject.gpu_batch if device == "cuda" else subject.batch
        images = torch.randn(batch, 3, subject.side, subject.side, generator=torch.Generator().manual_seed(0))
        images = images.to(device, getattr(torch, dtype))
        planner = Planner(model, images)
        for ratio in missing:
            options = Options.of(flops_budget=ratio, target=target, batch=batch)
            yield _row(subject, model, images, planner.plan(options), options, rounds)


@torch.no_grad()
def _row(
    subject: Subject, model: nn.Module, images: torch.Tensor, forecast: Forecast, options: Options, rounds: int
) -> Row:
    """Compile and time the original and the optimised model at one budget."""
    torch._dynamo.reset()
    fast = gtp_fx.optimize(model, flops_budget=options.flops_budget, example_inputs=images, target=options.target)
    assert tuple(fast.schedule) == tuple(forecast.schedule)
    original: Any = torch.compile(model)
    runs = {"original": lambda: original(images), "optimised": lambda: fast(images)}
    for run in runs.values():
        run()
    timings = interleave(runs, rounds=rounds, warmup=2, clock=clock_for(images.device))
    gain: Spread = timings.speed_up("optimised", "original")
    return Row(
        model=subject.name,
        side=subject.side,
        batch=len(images),
        flops_budget=float(options.flops_budget or 1),
        flops_ratio=forecast.flops_ratio,
        schedule=tuple(fast.schedule),
        predicted=forecast.speed_up,
        measured=gain.median,
        measured_quartiles=(gain.lower, gain.upper),
        predicted_seconds=(forecast.original.seconds, forecast.after.seconds),
        measured_seconds=(timings.spread("original").median, timings.spread("optimised").median),
    )


def median_error(rows: Sequence[Row]) -> float:
    """Return the median absolute relative error of the predicted speed-up."""
    return statistics.median(abs(row.error) for row in rows)


def table(rows: Sequence[Row]) -> str:
    """Return a table with a line per row, followed by the median error."""
    lines = [
        [
            f"{row.model} @{row.side} ×{row.batch}",
            f"{row.flops_ratio:.3f}",
            f"{1 / row.flops_ratio:.3f}",
            f"{row.predicted:.3f}",
            f"{row.measured:.3f}",
            f"{row.measured_quartiles[0]:.3f} – {row.measured_quartiles[1]:.3f}",
            f"{row.error:+.1%}",
            f"{row.predicted_seconds[0] / row.measured_seconds[0] - 1:+.0%}",
        ]
        for row in rows
    ]
    headers = ["", "FLOPs", "limit", "predicted", "measured", "quartiles", "error", "error of the original's time"]
    errors = [abs(row.error) for row in rows]
    return "\n".join(
        [
            tabulate(lines, headers, disable_numparse=True, colalign=("left", *("right",) * 7)),
            f"median error of the speed-up {median_error(rows):.1%}, largest {max(errors):.1%}; FLOPs alone: "
            f"{statistics.median(abs(1 / row.flops_ratio / row.measured - 1) for row in rows):.1%}",
        ]
    )


def draw(rows: Sequence[Row], target: Target, file: Path) -> None:
    """Draw predicted against measured speed-up to `file`: a dot per row, quartiles as error bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 6), layout="constrained")
    for color, name in enumerate(dict.fromkeys(row.model for row in rows)):
        own = [row for row in rows if row.model == name]
        measured = [row.measured for row in own]
        spread = [
            [row.measured - row.measured_quartiles[0] for row in own],
            [row.measured_quartiles[1] - row.measured for row in own],
        ]
        axes.errorbar(
            measured, [row.predicted for row in own], xerr=spread, fmt="o", color=f"C{color}", label=name, alpha=0.8
        )
    low, high = (f(v for row in rows for v in (row.predicted, row.measured)) for f in (min, max))
    ends = [low * 0.97, high * 1.03]
    axes.plot(ends, ends, color="0.4", linewidth=1)
    axes.fill_between(
        ends, [v * 0.93 for v in ends], [v * 1.07 for v in ends], color="0.4", alpha=0.12, label="within 7 %"
    )
    axes.set(
        xlabel="measured speed-up", ylabel="predicted speed-up", title=f"Cost model on target {target.name}, compiled"
    )
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def publish_rows(rows: Sequence[Row], target: Target, dtype: str, device: str, rounds: int, out: Path | None) -> None:
    """Write the rows to `out`; nothing where it is None."""
    if out is None:
        return
    result = {
        "bench": "cost_model",
        "dtype": dtype,
        "device": device,
        "rounds": rounds,
        "weights": "random, spread out",
        "environment": asdict(Environment.here(device)),
        "target": target.name,
        "curves_measured": target.measured,
        "median_error": median_error(rows),
        "rows": [{**asdict(row), "error": row.error} for row in rows],
    }
    publish(result, out)


def _known(out: Path | None, target: Target) -> list[Row]:
    """Return the rows of an earlier result file, if they were predicted with the same curves; else none."""
    if out is None or not out.exists():
        return []
    found = json.loads(out.read_text())
    if found.get("curves_measured") != target.measured:
        return []
    keys = Row.__dataclass_fields__
    rows = [
        {key: tuple(v) if isinstance(v, list) else v for key, v in row.items() if key in keys} for row in found["rows"]
    ]
    return [Row(**row) for row in rows]


if __name__ == "__main__":
    typer.run(main)
