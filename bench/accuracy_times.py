"""Benchmark: the curves of `bench.accuracy` against time instead of FLOPs, compiled.

    python -m bench.accuracy_times bench/results/accuracy.json --out bench/results/accuracy_times.json \\
        --plot bench/results/accuracy_times.png

It reads the rows of `bench.accuracy` and applies their schedules again, so each point has the score measured there. All
graphs of a net are timed in one interleaved run, on torch's default number of threads. These nets are small (64 tokens
of 64 channels), so the operators around the products weigh more than in a net of practical size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tabulate import tabulate

from bench.accuracy import Row, known_rows
from bench.contenders import Contender
from bench.digit_nets import NETS, load_or_train
from bench.digits import Split
from bench.environment import Environment
from bench.output import publish
from bench.tasks import TASKS
from gtp_fx.capture.inputs import call_signature
from gtp_fx.capture.module import capture_module
from gtp_fx.measure.timing import clock_for, interleave
from gtp_fx.model.pipeline import run_passes
from gtp_fx.options.options import DEFAULTS, Options
from gtp_fx.options.progress import progress_bar


@dataclass(frozen=True)
class TimedRow:
    """Score and time of one strategy at one budget, on one net and seed.

    net, seed, strategy, schedule, budget, flops_ratio: as in `bench.accuracy.Row`.
    base: the original's score, in [0, 1].
    score: the optimised model's score, in [0, 1].
    time_ratio: time of the optimised model / the original's, both compiled: median over rounds.
    quartiles: lower and upper quartile of the time ratio.
    """

    net: str
    seed: int
    strategy: str
    schedule: str
    budget: float
    flops_ratio: float
    base: float
    score: float
    time_ratio: float
    quartiles: tuple[float, float]


def main(
    rows: Annotated[Path, typer.Argument(help="What bench.accuracy wrote.")],
    net: Annotated[str, typer.Option(help="One of its nets.")] = "digits-cls",
    seed: Annotated[int, typer.Option()] = 0,
    budget: Annotated[list[float] | None, typer.Option(help="0.7 and 0.4 where none is given.")] = None,
    batch: Annotated[int, typer.Option(min=1)] = 64,
    rounds: Annotated[int, typer.Option(min=1)] = 30,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw scores against time to this PNG.")] = None,
) -> None:
    """Time the strategies of one net, each on gtp_fx's own schedule."""
    if net not in NETS:
        raise typer.BadParameter(f"{net!r} is none of the nets trained here: {', '.join(NETS)}")
    wanted = budget or [0.7, 0.4]
    chosen = [
        row
        for row in known_rows(rows)
        if (row.net, row.seed, row.schedule) == (net, seed, "auto") and row.budget in wanted and not row.refusal
    ]
    if not chosen:
        raise typer.BadParameter(f"{rows} has no row of {net}, seed {seed}, at {', '.join(map(str, wanted))}")
    timed = measure(chosen, batch, rounds)
    typer.echo(table(timed), err=out is None)
    publish(
        {
            "bench": "accuracy_times",
            "batch": batch,
            "rounds": rounds,
            "environment": asdict(Environment.here("cpu")),
            "rows": [asdict(row) for row in timed],
        },
        out,
    )
    if plot is not None:
        draw(timed, plot)


@torch.no_grad()
def measure(rows: Sequence[Row], batch: int, rounds: int) -> list[TimedRow]:
    """Time all rows, which are of one net and seed, against the original in one interleaved run."""
    config = NETS[rows[0].net]
    model = load_or_train(config, rows[0].seed)
    images, _ = TASKS[config.task].draw(Split.test, 0, batch, config.look, config.patch)
    captured = capture_module(model, call_signature(model, images[:2]))
    torch._dynamo.reset()
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 4 * len(rows))
    runs: dict[str, Any] = {"original": torch.compile(model)}
    for row in rows:
        strategy = Contender(row.strategy, row.schedule).made(config.class_token)
        made = run_passes(captured, Options.of(schedule=row.counts, strategy=strategy))
        runs[_name(row)] = torch.compile(made.graph_module)
    with progress_bar() as show:
        for done, (name, run) in enumerate(runs.items()):
            show(f"compiling {name}", done, len(runs))
            run(images)
    calls = {name: lambda run=run: run(images) for name, run in runs.items()}
    timings = interleave(calls, rounds=rounds, warmup=2, clock=clock_for(images.device))
    found = []
    for row in rows:
        gain = timings.speed_up(_name(row), "original")
        quartiles = (1 / gain.upper, 1 / gain.lower)
        known = (row.net, row.seed, row.strategy, row.schedule, row.budget, row.flops_ratio, row.base, row.score)
        found.append(TimedRow(*known, 1 / gain.median, quartiles))
    return found


def table(rows: Sequence[TimedRow]) -> str:
    """Return a Markdown table with a line per row."""
    lines = [
        [
            row.strategy,
            f"{row.budget:g}",
            f"{row.flops_ratio:.3f}",
            f"{row.time_ratio:.3f}",
            f"{row.quartiles[0]:.3f} – {row.quartiles[1]:.3f}",
            f"{100 * (row.score - row.base):+.1f}",
        ]
        for row in rows
    ]
    headers = ["strategy", "budget", "FLOPs", "time", "quartiles", "points"]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def draw(rows: Sequence[TimedRow], file: Path) -> None:
    """Draw score against time to `file`: a line per strategy, quartiles as error bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.8), layout="constrained")
    for number, strategy in enumerate(dict.fromkeys(row.strategy for row in rows)):
        own = sorted((row for row in rows if row.strategy == strategy), key=lambda row: row.time_ratio)
        axes.errorbar(
            [row.time_ratio for row in own],
            [100 * row.score for row in own],
            xerr=[
                [row.time_ratio - row.quartiles[0] for row in own],
                [row.quartiles[1] - row.time_ratio for row in own],
            ],
            label=strategy,
            color=f"C{number}",
            marker="o",
            linewidth=2.5 if strategy == DEFAULTS["strategy"] else 1.2,
            capsize=2,
        )
    axes.axhline(100 * rows[0].base, color="0.5", linewidth=1)
    axes.axvline(1, color="0.5", linewidth=1)
    axes.set(
        title=f"{rows[0].net}, seed {rows[0].seed}", xlabel="time, of the original's, both compiled", ylabel="score, %"
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _name(row: Row) -> str:
    return f"{row.strategy} at {row.budget:g}"


if __name__ == "__main__":
    typer.run(main)
