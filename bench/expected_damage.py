"""Benchmark: expected damage against measured divergence, for schedules of the same FLOPs on trained nets.

    python -m bench.expected_damage --out bench/results/expected_damage.json

Nets are those trained on digits, and with --data those trained on photographs. For each net and budget, some dozens of
schedules are drawn: one to eight sites anywhere with random counts, scaled to the budget. The divergence of their
outputs is compared with the damage that the prior and a measured table expect. Only comparisons between schedules
count, so one factor per net and budget is free. The result is the spread of the remaining ratio, as a factor, and
whether schedules with few and many sites are judged alike.
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

from bench import photograph_nets
from bench.digit_nets import NETS, load_or_train
from bench.digits import Split
from bench.environment import Environment
from bench.output import publish
from bench.photograph_nets import PHOTOGRAPH_NETS, resized
from bench.photographs import load_net, load_photographs
from bench.tasks import TASKS, outputs_of
from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.capture.inputs import call_signature
from gtp_fx.capture.module import capture_module
from gtp_fx.model.pipeline import run_exact_passes
from gtp_fx.options.calibration import Calibration
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
"""Numbers of sites of the drawn schedules, in turn."""
_CALIBRATION = 64


@dataclass(frozen=True)
class Row:
    """One schedule on one net.

    net: name of the net.
    budget: FLOPs budget, as a share of the original's.
    counts: removed tokens at each site.
    sites: number of sites that remove tokens.
    prior: damage expected by the prior.
    measured: damage expected by tables measured on unlabelled images.
    moved: divergence of the outputs on unseen images.
    """

    net: str
    budget: float
    counts: tuple[int, ...]
    sites: int
    prior: float
    measured: float
    moved: float


def main(
    net: Annotated[
        list[str] | None, typer.Option(help="Of bench.digit_nets, or, with --data, of bench.photograph_nets.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="CIFAR-10 as JPEGs, a folder or a tar.")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Of the net for those photographs (`bench.photographs`).")
    ] = None,
    schedules: Annotated[
        int, typer.Option(min=len(SITES), help="Schedules drawn for each net and budget: of each number of sites one.")
    ] = 40,
    test_images: Annotated[int, typer.Option(help="Images that divergence is measured on.")] = 300,
    strategy: Annotated[str, typer.Option(help="Strategy that removes the tokens.")] = "regeneration",
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
) -> None:
    """Compare expected damage with divergence."""
    if unknown := [name for name in net or () if name not in (*NETS, *PHOTOGRAPH_NETS)]:
        raise typer.BadParameter(f"{unknown[0]!r} is unknown; nets are {', '.join((*NETS, *PHOTOGRAPH_NETS))}")
    if data is None and (lacking := [name for name in net or () if name in PHOTOGRAPH_NETS]):
        raise typer.BadParameter(f"{lacking[0]} needs --data, which isn't part of this repository")
    rows: list[Row] = []
    for name, model, unlabelled, images in _subjects(net or [], data, weights, test_images):
        rows += measure(name, model, unlabelled, images, schedules, strategy)
        typer.echo(table(rows), err=True)
    here = {"bench": "expected_damage", "strategy": strategy, "environment": asdict(Environment.here("cpu"))}
    publish({**here, "summary": [asdict(s) for s in summaries(rows)], "rows": [asdict(row) for row in rows]}, out)


def _subjects(
    nets: Sequence[str], data: Path | None, weights: Path | None, count: int
) -> Iterator[tuple[str, nn.Module, Tensor, Tensor]]:
    """Yield name, net, calibration images and unseen images."""
    if data is not None:
        unlabelled_photographs, _ = load_photographs(data, "train", _CALIBRATION // 10)
        photographs, _ = load_photographs(data, "test", count // 10)
        if weights is not None:
            yield "photographs", load_net(weights), unlabelled_photographs, photographs
    for name in nets:
        if name in PHOTOGRAPH_NETS:
            sides, model = PHOTOGRAPH_NETS[name], photograph_nets.load_or_train(name, 0, data)
            yield name, model, resized(unlabelled_photographs, sides), resized(photographs, sides)
            continue
        config = NETS[name]
        with progress_bar() as show:
            model = load_or_train(config, 0, show)
        draw = TASKS[config.task].draw
        unlabelled, _ = draw(Split.calibration, 0, _CALIBRATION, config.look, config.patch)
        yield name, model, unlabelled, draw(Split.test, 0, count, config.look, config.patch)[0]


def measure(name: str, model: nn.Module, unlabelled: Tensor, images: Tensor, schedules: int, named: str) -> list[Row]:
    """Return the rows of one net at every budget. named: the strategy."""
    signature = call_signature(model, images[:2])
    options = Options.of(flops_budget=0.5, strategy=named)
    exact = run_exact_passes(capture_module(model, signature), options)
    gm = exact.graph_module
    blocks = typed_graph(gm.graph).blocks
    shapes = tuple(map(block_shape, blocks))
    strategy = options.first_strategy
    found = find_sites(typed_graph(gm.graph), strategy)
    costs = flops_model(found.typing, found.sites, strategy, exact.original.flops)
    original = outputs_of(model, images)

    def moved(counts: Sequence[int], on: Tensor, wanted: Tensor) -> float:
        return divergence(
            outputs_of(apply_plan_unverified(gm, Plan.of(found.sites, counts, shapes, strategy)), on), wanted
        )

    wanted = outputs_of(model, unlabelled)
    judged = lambda counts: moved(counts, unlabelled, wanted)  # noqa: E731
    tables = measured_damage(found.sites, Calibration(unlabelled).points, judged, len(unlabelled))
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
    """Draw counts at `sites` random sites that just meet the budget; return None where those sites can't meet it."""
    places = sorted(generator.sample(range(len(costs.sites)), min(sites, len(costs.sites))))
    shares = [generator.uniform(0.5, 1.5) for _ in places]
    whole, limit = costs.sites[0].whole, budget * costs.original

    def at(total: int) -> tuple[int, ...]:
        counts, removed, share = [0] * len(costs.sites), 0, 0.0
        for place, weight in zip(places, shares, strict=True):
            share += weight / sum(shares)
            counts[place], removed = round(total * share) - removed, round(total * share)
        return tuple(counts)

    return next((at(total) for total in range(1, whole) if costs.cost(at(total)) <= limit), None)


def _damage(costs: CostModel, damage: Damage, counts: Sequence[int]) -> float:
    """Return the damage expected of a schedule."""
    return float(sum(damage.of(chain, remaining_tokens(chain, counts)) for chain in costs.chains))


@dataclass(frozen=True)
class Summary:
    """Error of expected damage, on one net at one budget.

    net: name of the net.
    budget: FLOPs budget, as a share of the original's.
    by: "prior" or "measured".
    schedules: number of schedules.
    spread: standard deviation of log(divergence / expected), as a factor.
    slope: change of log(divergence / expected) with each halving of the number of sites; negative where few sites do
        less damage than expected.
    """

    net: str
    budget: float
    by: str
    schedules: int
    spread: float
    slope: float


def summaries(rows: Sequence[Row]) -> list[Summary]:
    """Return a summary for each net, budget and kind of expectation."""
    found = []
    for net, budget in dict.fromkeys((row.net, row.budget) for row in rows):
        own = [row for row in rows if (row.net, row.budget) == (net, budget)]
        for by in ("prior", "measured"):
            rest = np.array([np.log(row.moved / getattr(row, by)) for row in own])
            slope = -np.polyfit(np.log2([row.sites for row in own]), rest, 1)[0]
            found.append(Summary(net, budget, by, len(own), float(np.exp(statistics.stdev(rest))), float(slope)))
    return found


def table(rows: Sequence[Row]) -> str:
    """Return a table of the summaries."""
    lines = [[s.net, f"{s.budget:g}", s.by, s.schedules, f"{s.spread:.2f}", f"{s.slope:+.2f}"] for s in summaries(rows)]
    return tabulate(lines, ["net", "FLOPs", "expected by", "schedules", "off by a factor", "per halving of sites"])


if __name__ == "__main__":
    torch.set_num_threads(1)  # the nets are too small for a second thread to help
    typer.run(main)
