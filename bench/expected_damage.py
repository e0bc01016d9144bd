"""How far is expected damage from what happens? Schedules of the same FLOPs, at few sites and many, on trained nets.

    python -m bench.expected_damage --out bench/results/expected_damage.json

For each net and budget some dozens of schedules are drawn: one to eight sites anywhere, counts at random, each brought to the budget.
Divergence of the outputs is held against the damage that the prior and a measured table expect. One factor a net and budget is free,
since only comparisons count; what is told is the spread of the rest, as a factor, and whether schedules of few sites are judged as
fairly as those of many.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
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
from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.capture.inputs import call_signature
from gtp_fx.capture.module import capture_module
from gtp_fx.model.pipeline import run_exact_passes
from gtp_fx.options.calibration import Calibration, bound
from gtp_fx.options.options import Options
from gtp_fx.options.progress import progress_bar
from gtp_fx.passes.runner import apply_plan_unverified
from gtp_fx.plan.cost.chains import CostModel, remaining_tokens
from gtp_fx.plan.cost.closed_form import flops_model
from gtp_fx.plan.damage.divergence import divergence
from gtp_fx.plan.damage.prior import prior_damage
from gtp_fx.plan.damage.sensitivity import measured_damage
from gtp_fx.plan.damage.tables import Damage
from gtp_fx.plan.find_sites import block_shape, find_sites
from gtp_fx.plan.plan import Plan

BUDGETS = (0.74, 0.55)
SITES = (1, 1, 2, 2, 3, 4, 6, 8)
"""How many sites a drawn schedule has, in turn."""
_CALIBRATION = 64


@dataclass(frozen=True)
class Row:
    """One schedule on one net. expected: damage by the prior and by tables measured on unlabelled images; moved: divergence on unseen ones."""

    net: str
    budget: float
    counts: tuple[int, ...]
    sites: int
    prior: float
    measured: float
    moved: float


def main(
    net: Annotated[list[str] | None, typer.Option(help="Of bench.digit_nets; digits-cls and digits-pooled.")] = None,
    data: Annotated[Path | None, typer.Option(help="CIFAR-10 as JPEGs, a folder or a tar.")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Of the net for those photographs (`bench.photographs`).")
    ] = None,
    schedules: Annotated[int, typer.Option(help="Schedules drawn for each net and budget.")] = 40,
    test_images: Annotated[int, typer.Option(help="Images that divergence is measured on.")] = 300,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
) -> None:
    """Hold expected damage against divergence."""
    rows: list[Row] = []
    for name, model, unlabelled, images in _subjects(net or [], data, weights, test_images):
        rows += measure(name, model, unlabelled, images, schedules)
        typer.echo(table(rows), err=True)
    here = {"bench": "expected_damage", "environment": asdict(Environment.here("cpu"))}
    publish({**here, "summary": [asdict(s) for s in summaries(rows)], "rows": [asdict(row) for row in rows]}, out)


def _subjects(
    nets: Sequence[str], data: Path | None, weights: Path | None, count: int
) -> Iterator[tuple[str, nn.Module, Tensor, Tensor]]:
    """Name, net, calibration's images, unseen ones."""
    if data is not None and weights is not None:
        unlabelled, _ = load_photographs(data, "train", _CALIBRATION // 10)
        yield "photographs", load_net(weights), unlabelled, load_photographs(data, "test", count // 10)[0]
    for name in nets:
        config = NETS[name]
        with progress_bar() as show:
            model = load_or_train(config, 0, show)
        draw = TASKS[config.task].draw
        unlabelled, _ = draw(Split.calibration, 0, _CALIBRATION, config.look, config.patch)
        yield name, model, unlabelled, draw(Split.test, 0, count, config.look, config.patch)[0]


def measure(name: str, model: nn.Module, unlabelled: Tensor, images: Tensor, schedules: int) -> list[Row]:
    """Every budget on one net."""
    signature = call_signature(model, images[:2])
    options = Options.of(flops_budget=0.5)
    exact = run_exact_passes(capture_module(model, signature), options)
    gm, strategy = exact.graph_module, gtp_fx.GTP(token_scale=False)
    blocks = typed_graph(gm.graph).blocks
    shapes = tuple(map(block_shape, blocks))
    found = find_sites(typed_graph(gm.graph), strategy)
    costs = flops_model(found.typing, found.sites, strategy, exact.original.flops)
    original = outputs_of(model, images)
    calibration = bound(Calibration.of(unlabelled), signature.canonical)

    def moved(counts: Sequence[int], on: Tensor, wanted: Tensor) -> float:
        return divergence(
            outputs_of(apply_plan_unverified(gm, Plan.of(found.sites, counts, shapes, strategy)), on), wanted
        )

    wanted = outputs_of(model, unlabelled)
    judged = lambda counts, _: moved(counts, unlabelled, wanted)  # noqa: E731
    tables = measured_damage(gm, found.sites, shapes, strategy, calibration, judged, None)
    prior = prior_damage(found.sites)
    rows, generator = [], random.Random(0)
    for budget in BUDGETS:
        for number in range(schedules):
            counts = _drawn(costs, budget, SITES[number % len(SITES)], generator)
            if counts is not None:
                expected = (_damage(costs, prior, counts), _damage(costs, tables, counts))
                used = sum(map(bool, counts))
                rows.append(Row(name, budget, counts, used, *expected, moved(counts, images, original)))
    return rows


def _drawn(costs: CostModel, budget: float, sites: int, generator: random.Random) -> tuple[int, ...] | None:
    """Counts at so many sites that just meet the budget; None where those sites can't."""
    places = sorted(generator.sample(range(len(costs.sites)), min(sites, len(costs.sites))))
    shares = [generator.uniform(0.5, 1.5) for _ in places]
    whole, limit = costs.sites[0].whole, budget * costs.original

    def at(total: int) -> tuple[int, ...]:
        counts, gone, share = [0] * len(costs.sites), 0, 0.0
        for place, weight in zip(places, shares, strict=True):
            share += weight / sum(shares)
            counts[place], gone = round(total * share) - gone, round(total * share)
        return tuple(counts)

    return next((at(total) for total in range(1, whole) if costs.cost(at(total)) <= limit), None)


def _damage(costs: CostModel, damage: Damage, counts: Sequence[int]) -> float:
    return float(sum(damage.of(chain, remaining_tokens(chain, counts)) for chain in costs.chains))


@dataclass(frozen=True)
class Summary:
    """spread: the standard deviation of log(divergence / expected), as a factor. slope: by how much divergence is below what was
    expected (negative) for each halving of the sites, in logarithms."""

    net: str
    budget: float
    by: str
    schedules: int
    spread: float
    slope: float


def summaries(rows: Sequence[Row]) -> list[Summary]:
    found = []
    for net, budget in dict.fromkeys((row.net, row.budget) for row in rows):
        own = [row for row in rows if (row.net, row.budget) == (net, budget)]
        for by in ("prior", "measured"):
            rest = np.array([np.log(row.moved / getattr(row, by)) for row in own])
            slope = -np.polyfit(np.log2([row.sites for row in own]), rest, 1)[0]
            found.append(Summary(net, budget, by, len(own), float(np.exp(statistics.stdev(rest))), float(slope)))
    return found


def table(rows: Sequence[Row]) -> str:
    """For people."""
    lines = [[s.net, f"{s.budget:g}", s.by, s.schedules, f"{s.spread:.2f}", f"{s.slope:+.2f}"] for s in summaries(rows)]
    return tabulate(lines, ["net", "FLOPs", "expected by", "schedules", "off by a factor", "per halving of sites"])


if __name__ == "__main__":
    torch.set_num_threads(1)  # small nets: a second thread waits more than it works
    typer.run(main)
