"""Does attention need to know how many tokens a key stands for? Outputs with and without, on trained nets.

    python -m bench.token_scale --out bench/results/token_scale.json

For each net, alpha and budget one schedule runs twice: with log s on the logits of every later attention (arXiv
2311.03035, proportional attention) and without. Reported beside it: the bound on log s that the plan knows
(`gtp_fx.strategies.token_scale`), how far the reduction itself moves the outputs, and the difference of the two runs
as a share of that. With --data and --net a net trained on photographs is measured too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from tabulate import tabulate
from torch import Tensor, nn

import gtp_fx
from bench.digit_nets import NETS, load_or_train
from bench.digits import Split
from bench.environment import Environment
from bench.output import publish
from bench.photographs import load_net, load_photographs
from bench.tasks import TASKS, outputs_of
from gtp_fx.capture.inputs import call_signature
from gtp_fx.capture.module import capture_module
from gtp_fx.model.pipeline import Optimised, run_passes
from gtp_fx.options.options import Options
from gtp_fx.options.progress import progress_bar
from gtp_fx.plan.damage.divergence import divergence
from gtp_fx.strategies.token_scale import SCALES_READ_FROM, log_scale_bound

ALPHAS = (0.05, 0.1, 0.2, 0.4, 1.0)
BUDGETS = (0.74, 0.55)


@dataclass(frozen=True)
class Row:
    """One net, alpha and budget.

    bound: of log s.
    told, untold, base: scores in [0, 1] with token scales, without, and of the original.
    moved: divergence of the outputs with token scales from the original's.
    apart: divergence of the outputs without token scales from those with them.
    """

    net: str
    alpha: float
    budget: float
    bound: float
    base: float
    told: float
    untold: float
    moved: float
    apart: float

    @property
    def share(self) -> float:
        """Of how far the reduction moves the outputs."""
        return self.apart / self.moved


def main(
    net: Annotated[list[str] | None, typer.Option(help="Of bench.digit_nets; digits-cls and digits-pooled.")] = None,
    data: Annotated[Path | None, typer.Option(help="CIFAR-10 as JPEGs, a folder or a tar.")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Of the net for those photographs (`bench.photographs`).")
    ] = None,
    test_images: Annotated[int, typer.Option(help="Images that scores are measured on.")] = 1000,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
) -> None:
    """Measure what telling token scales changes."""
    rows: list[Row] = []
    for name, model, images, labels in _subjects(net or ["digits-cls", "digits-pooled"], data, weights, test_images):
        rows += measure(name, model, images, labels)
        typer.echo(table(rows), err=True)
    found = {"bench": "token_scale", "told_from": SCALES_READ_FROM, "test_images": test_images}
    here = {"environment": asdict(Environment.here("cpu"))}
    publish({**found, **here, "rows": [{**asdict(row), "share": row.share} for row in rows]}, out)


def _subjects(
    nets: list[str], data: Path | None, weights: Path | None, count: int
) -> Iterator[tuple[str, nn.Module, Tensor, Tensor]]:
    if data is not None and weights is not None:
        yield "photographs", load_net(weights), *load_photographs(data, "test", count // 10)
    for name in nets:
        config = NETS[name]
        with progress_bar() as show:
            model = load_or_train(config, 0, show)
        yield name, model, *TASKS[config.task].draw(Split.test, 0, count, config.look, config.patch)


def measure(name: str, model: nn.Module, images: Tensor, labels: Tensor) -> list[Row]:
    """Every alpha and budget on one net, scored by the class of the largest output."""
    original = outputs_of(model, images)
    base = _score(original, labels)
    captured = capture_module(model, call_signature(model, images[:2]))
    rows = []
    for budget in BUDGETS:
        for alpha in ALPHAS:
            told = run_passes(
                captured, Options.of(flops_budget=budget, strategy=gtp_fx.GTP(alpha=alpha, token_scale=True))
            )
            strategy = gtp_fx.GTP(alpha=alpha, token_scale=False)
            untold = run_passes(captured, Options.of(schedule=list(told.schedule), strategy=strategy))
            counts = [count for count in told.schedule.removed if count]
            bound = log_scale_bound(_grid(told), strategy.graph, strategy.neighbors, alpha, counts)
            with_, without = (outputs_of(made.graph_module, images) for made in (told, untold))
            scores = (_score(with_, labels), _score(without, labels))
            moved, apart = divergence(with_, original), divergence(without, with_)
            rows.append(Row(name, alpha, budget, bound, base, *scores, moved, apart))
    return rows


def _grid(made: Optimised) -> tuple[int, ...]:
    """Of the one stream that these nets have."""
    (grid,) = {site.grid for site in made.sites}
    return grid.shape


def _score(outputs: Tensor, labels: Tensor) -> float:
    return float((outputs.argmax(1) == labels).double().mean())


def table(rows: list[Row]) -> str:
    """For people."""
    lines = [
        [
            r.net,
            f"{r.budget:g}",
            f"{r.alpha:g}",
            f"{r.bound:.3f}",
            *(f"{score:.1%}" for score in (r.base, r.told, r.untold)),
            f"{r.moved:.3g}",
            f"{r.apart:.2g}",
            f"{r.share:.1%}",
        ]
        for r in rows
    ]
    headers = ["net", "FLOPs", "alpha", "log s at most", "original", "told", "untold", "moved", "apart", "share"]
    return tabulate(lines, headers, disable_numparse=True)


if __name__ == "__main__":
    torch.set_num_threads(1)  # small nets: a second thread waits more than it works
    typer.run(main)
