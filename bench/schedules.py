"""Which schedule keeps most accuracy at equal FLOPs? On nets trained on digits: uniform, even, prior, calibrated.

    python -m bench.schedules --out bench/results/schedules_digits.json --plot bench/results/schedules_digits.png

Accuracy is on canvases of digits that no net has seen, with the spread over seeds; calibration sees unlabelled
canvases separate from both. Nets are trained where the cache has none, some minutes each. The KL divergence from the
original's outputs is reported beside accuracy, since it separates schedules where accuracy is within noise.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tabulate import tabulate
from torch import Tensor, nn

import gtp_fx
from bench.digit_nets import NetConfig, load_or_train
from bench.digits import Split, canvases
from bench.environment import Environment
from bench.output import publish
from bench.tasks import outputs_of
from gtp_fx.errors import BudgetError
from gtp_fx.options.progress import progress_bar
from gtp_fx.plan.damage.divergence import divergence

NETS = {"CLS": NetConfig(), "pooled": NetConfig(class_token=False)}
BUDGETS = (0.8, 0.6, 0.4)
UNIFORM, EVEN, AUTO, CALIBRATED, REFINED = "uniform", "even", "auto", "calibrated", "refined"
WAYS = (UNIFORM, EVEN, AUTO, CALIBRATED, REFINED)
_REFINE = 16
"""Whole schedules that "refined" looks at beyond those that "calibrated" does."""


@dataclass(frozen=True)
class Row:
    """One net and seed at one budget with one way to choose the schedule. accuracy and base in [0, 1]; kl in nats."""

    net: str
    seed: int
    budget: float
    way: str
    schedule: tuple[int, ...]
    flops_ratio: float
    accuracy: float
    base: float
    kl: float


def main(
    seed: Annotated[
        list[int] | None, typer.Option(help="Seeds, each its own net; 0, 1 and 2 where none is given.")
    ] = None,
    net: Annotated[list[str] | None, typer.Option(help="CLS or pooled; both where none is given.")] = None,
    budget: Annotated[list[float] | None, typer.Option(help="Instead of 0.8, 0.6 and 0.4.")] = None,
    test_images: Annotated[int, typer.Option(help="Canvases that accuracy is measured on.")] = 2000,
    calibration_images: Annotated[int, typer.Option(help="Unlabelled canvases that calibration sees.")] = 64,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw accuracy against FLOPs to this PNG.")] = None,
) -> None:
    """Measure what each way of choosing a schedule costs in accuracy."""
    rows: list[Row] = []
    for name in net or list(NETS):
        for number in seed or [0, 1, 2]:
            rows += measure(name, number, budget or list(BUDGETS), test_images, calibration_images)
            typer.echo(table(rows), err=True)
    publish(
        {
            "bench": "schedules",
            "nets": {name: asdict(NETS[name]) for name in dict.fromkeys(row.net for row in rows)},
            "test_images": test_images,
            "calibration_images": calibration_images,
            "refine": _REFINE,
            "environment": asdict(Environment.here("cpu")),
            "summary": [asdict(summary) for summary in summaries(rows)],
            "rows": [asdict(row) for row in rows],
        },
        out,
    )
    if plot is not None:
        draw(rows, plot)


def measure(name: str, seed: int, budgets: Sequence[float], test_images: int, calibration_images: int) -> list[Row]:
    """All ways at all budgets on one net."""
    config = NETS[name]
    with progress_bar() as show:
        model = load_or_train(config, seed, show)
    images, labels = canvases(Split.test, 0, test_images, config.look)
    unlabelled, _ = canvases(Split.calibration, 0, calibration_images, config.look)
    original = outputs_of(model, images)
    base = float((original.argmax(1) == labels).double().mean())
    rows = []
    for ratio in budgets:
        for way in WAYS:
            try:
                fast = _optimised(model, way, ratio, unlabelled)
            except BudgetError:
                continue  # uniform counts don't reach every budget
            found = outputs_of(fast.graph_module, images)
            correct = float((found.argmax(1) == labels).double().mean())
            kl = divergence(found, original)
            rows.append(Row(name, seed, ratio, way, tuple(fast.schedule), fast.report.flops_ratio, correct, base, kl))
    return rows


def _optimised(model: nn.Module, way: str, ratio: float, unlabelled: Tensor) -> gtp_fx.OptimizedModel:
    options: dict[str, Any] = {"flops_budget": ratio, "example_inputs": unlabelled[:2], "compile": False}
    if way in (CALIBRATED, REFINED):
        refine = _REFINE if way == REFINED else 0
        options["calibration"] = gtp_fx.Calibration(unlabelled, refine=refine)
    else:
        options["schedule"] = way
    return gtp_fx.optimize(model, **options)


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation over seeds of the accuracy lost against the original, in points; mean divergence."""

    net: str
    budget: float
    way: str
    seeds: int
    lost: float
    spread: float
    kl: float


def summaries(rows: Sequence[Row]) -> list[Summary]:
    found = []
    for net, budget, way in dict.fromkeys((row.net, row.budget, row.way) for row in rows):
        own = [row for row in rows if (row.net, row.budget, row.way) == (net, budget, way)]
        lost = [100 * (row.base - row.accuracy) for row in own]
        spread = statistics.stdev(lost) if len(lost) > 1 else 0.0
        kl = statistics.fmean(row.kl for row in own)
        found.append(Summary(net, budget, way, len(own), statistics.fmean(lost), spread, kl))
    return found


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line a net and budget, a column a way."""
    by_key = {(s.net, s.budget, s.way): s for s in summaries(rows)}
    lines = []
    for net, budget in dict.fromkeys((row.net, row.budget) for row in rows):
        cells = []
        for way in WAYS:
            s = by_key.get((net, budget, way))
            cells.append("not reached" if s is None else f"{-s.lost:+.2f} ± {s.spread:.2f} ({s.kl:.4f})")
        lines.append([net, f"{budget:g}", *cells])
    bases = {net: [row.base for row in rows if row.net == net] for net in dict.fromkeys(row.net for row in rows)}
    told = ", ".join(f"{net} {statistics.fmean(values):.1%}" for net, values in bases.items())
    return "\n".join(
        [
            tabulate(lines, ["net", "FLOPs", *WAYS], tablefmt="github", disable_numparse=True),
            f"points of accuracy against the original ({told}), mean ± deviation over seeds; "
            f"in brackets the KL divergence",
        ]
    )


def draw(rows: Sequence[Row], file: Path) -> None:
    """Accuracy against FLOPs, a panel a net, a line a way, with the spread over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    nets = list(dict.fromkeys(row.net for row in rows))
    figure, panels = pyplot.subplots(1, len(nets), figsize=(5.6 * len(nets), 4.4), layout="constrained", squeeze=False)
    found = summaries(rows)
    for axes, net in zip(panels[0], nets, strict=True):
        for way in WAYS:
            own = [s for s in found if (s.net, s.way) == (net, way)]
            axes.errorbar(
                [s.budget for s in own],
                [-s.lost for s in own],
                [s.spread for s in own],
                label=way,
                capsize=3,
                marker="o",
            )
        axes.axhline(0, color="0.5", linewidth=1)
        axes.set(
            title=f"{net}, {len({row.seed for row in rows if row.net == net})} seeds", xlabel="FLOPs, of the original's"
        )
        axes.set(ylabel="points of accuracy against the original")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    torch.set_num_threads(1)  # small nets: a second thread waits more than it works
    typer.run(main)
