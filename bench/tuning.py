"""Is tuning without labels as good as a grid with them? GTP's numbers on the digit nets, by three judges.

    python -m bench.tuning --out bench/results/tuning_digits.json

default    GTP as it comes, on the schedule that the prior chooses
agreement  the same with M and alpha as the agreement of graph neighbours proposes (`bench.agreement`)
grid       the best of alpha x M x score by the labels of calibration canvases, on the prior's schedule
unlabelled `Auto([GTP()])` on the same canvases without labels: schedule, alpha, M, score, graph
refined    the same with the agreement's proposal and its variants among what it chooses from

Scores are of canvases whose digits none of them has seen.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tabulate import tabulate
from torch import Tensor, fx

import gtp_fx
from bench.agreement import neighbour_agreement
from bench.digit_nets import NETS, load_or_train
from bench.digits import Split
from bench.environment import Environment
from bench.output import publish
from bench.tasks import TASKS, Task, outputs_of
from gtp_fx.capture.inputs import call_signature
from gtp_fx.capture.module import capture_module
from gtp_fx.model.pipeline import run_passes
from gtp_fx.options.calibration import bound
from gtp_fx.options.options import Options
from gtp_fx.options.progress import progress_bar
from gtp_fx.plan.damage.divergence import divergence
from gtp_fx.strategies import Auto

ALPHAS, NEIGHBORS = (0.0, 0.1, 0.2, 0.4), (4, 8, 16)
SCORES = ("mixed-max", "mixed-mean", "broadcast-mean")
WAYS = ("default", "agreement", "grid", "unlabelled", "refined")


@dataclass(frozen=True)
class Row:
    """One net and seed at one budget by one way.

    score, base: in [0, 1].
    moved: divergence of the outputs from the original's on the test canvases.
    """

    net: str
    seed: int
    budget: float
    way: str
    strategy: str
    schedule: tuple[int, ...]
    flops_ratio: float
    base: float
    score: float
    moved: float


def main(
    net: Annotated[
        list[str] | None, typer.Option(help="digits-cls, digits-pooled and patches where none is given.")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="0, 1 and 2 where none is given.")] = None,
    budget: Annotated[list[float] | None, typer.Option(help="0.5 and 0.3 where none is given.")] = None,
    calibration_images: Annotated[int, typer.Option(help="Canvases that a way may look at.")] = 200,
    test_images: Annotated[int, typer.Option(help="Canvases that scores are measured on.")] = 1000,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
) -> None:
    """Compare ways to choose GTP's numbers."""
    rows: list[Row] = []
    for name in net or ("digits-cls", "digits-pooled", "patches"):
        for number in seed or (0, 1, 2):
            rows += measure(name, number, budget or (0.5, 0.3), calibration_images, test_images)
            typer.echo(table(rows), err=True)
            result = {
                "bench": "tuning",
                "calibration_images": calibration_images,
                "test_images": test_images,
                "environment": asdict(Environment.here("cpu")),
                "rows": [asdict(row) for row in rows],
            }
            if out is not None:
                publish(result, out)
    if out is None:
        publish(result, None)


def measure(name: str, seed: int, budgets: Sequence[float], calibration_images: int, test_images: int) -> list[Row]:
    """All ways on one net."""
    config = NETS[name]
    task = TASKS[config.task]
    with progress_bar() as show:
        model = load_or_train(config, seed, show)
    images, labels = task.draw(Split.test, 0, test_images, config.look, config.patch)
    original = outputs_of(model, images)
    base = task.score(original, labels)
    known = task.draw(Split.calibration, 0, calibration_images, config.look, config.patch)
    signature = call_signature(model, images[:2])
    captured = capture_module(model, signature)
    calibration = bound(gtp_fx.Calibration(known[0], refine=16, progress=False), signature.canonical)
    proposed = neighbour_agreement(model, known[0]).proposed()
    rows = []
    for ratio in budgets:
        chosen: dict[str, dict[str, Any]] = {
            "default": {"strategy": gtp_fx.GTP(), "flops_budget": ratio},
            "agreement": {"strategy": proposed, "flops_budget": ratio},
            "grid": {"strategy": _by_grid(captured, task, known, ratio), "flops_budget": ratio},
            "unlabelled": {"strategy": Auto([gtp_fx.GTP()]), "flops_budget": ratio, "calibration": calibration},
            "refined": {"strategy": Auto([gtp_fx.GTP(), proposed]), "flops_budget": ratio, "calibration": calibration},
        }
        for way, options in chosen.items():
            made = run_passes(captured, Options.of(**options))
            outputs = outputs_of(made.graph_module, images)
            found = (made.report.flops_ratio, base, task.score(outputs, labels), divergence(outputs, original))
            rows.append(Row(name, seed, ratio, way, str(made.strategy), tuple(made.schedule), *found))
    return rows


def _by_grid(captured: fx.GraphModule, task: Task, known: tuple[Tensor, Tensor], ratio: float) -> gtp_fx.GTP:
    """The one of the best score on labelled canvases; of equals the first."""
    images, labels = known
    grid = [
        replace(gtp_fx.GTP(), alpha=alpha, neighbors=count, score=score)
        for score, alpha, count in itertools.product(SCORES, ALPHAS, NEIGHBORS)
    ]

    def score(strategy: gtp_fx.GTP) -> float:
        made = run_passes(captured, Options.of(flops_budget=ratio, strategy=strategy))
        return task.score(outputs_of(made.graph_module, images), labels)

    return max(grid, key=score)


def table(rows: Sequence[Row]) -> str:
    """Markdown: points of score against the original, mean ± deviation over seeds."""
    lines = []
    for net, budget in dict.fromkeys((row.net, row.budget) for row in rows):
        cells = []
        for way in WAYS:
            points = [100 * (r.score - r.base) for r in rows if (r.net, r.budget, r.way) == (net, budget, way)]
            spread = statistics.stdev(points) if len(points) > 1 else 0.0
            cells.append(f"{statistics.fmean(points):+.2f} ± {spread:.2f}")
        lines.append([net, f"{budget:g}", *cells])
    total = [f"{statistics.fmean(100 * (r.score - r.base) for r in rows if r.way == way):+.2f}" for way in WAYS]
    lines.append(["mean", "", *total])
    return tabulate(lines, ["net", "FLOPs", *WAYS], tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    torch.set_num_threads(1)  # small nets: a second thread waits more than it works
    typer.run(main)
