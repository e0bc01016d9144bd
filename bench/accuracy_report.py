"""Rows of `bench.accuracy` as a person reads them: a table of points lost, and curves."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

if TYPE_CHECKING:
    from bench.accuracy import Row


@dataclass(frozen=True)
class Summary:
    """Over seeds, of one curve at one budget: points of score against the original, their mean and deviation.

    score in [0, 1]. reached: of how many seeds; none where it was refused.
    """

    net: str
    strategy: str
    schedule: str
    budget: float
    points: float
    spread: float
    score: float
    reached: int


def summaries(rows: Sequence[Row]) -> list[Summary]:
    found = []
    for net, strategy, schedule, budget in dict.fromkeys((r.net, r.strategy, r.schedule, r.budget) for r in rows):
        own = [
            r
            for r in rows
            if (r.net, r.strategy, r.schedule, r.budget) == (net, strategy, schedule, budget) and not r.refusal
        ]
        points = [100 * (row.score - row.base) for row in own]
        mean = statistics.fmean(points) if points else 0.0
        spread = statistics.stdev(points) if len(points) > 1 else 0.0
        score = statistics.fmean(row.score for row in own) if own else 0.0
        found.append(Summary(net, strategy, schedule, budget, mean, spread, score, len(own)))
    return found


def overall(rows: Sequence[Row]) -> list[tuple[str, str, float, float, int]]:
    """strategy, schedule, mean points over nets, budgets and seeds, deviation over seeds of that mean, and how many rows it misses.

    Of the nets that no strategy refuses for good; where one can't reach a budget it is taken for the worst that any reached there:
    a budget that isn't met is no result.
    """
    shared = {net for net in dict.fromkeys(r.net for r in rows) if _is_for_all(rows, net)}
    found = []
    for strategy, schedule in dict.fromkeys((row.strategy, row.schedule) for row in rows):
        own = [r for r in rows if (r.strategy, r.schedule) == (strategy, schedule) and r.net in shared]
        found.append((strategy, schedule, *_mean_points(own, rows), sum(bool(r.refusal) for r in own)))
    return sorted(found, key=lambda line: -line[2])


def by_net(rows: Sequence[Row]) -> str:
    """A line a strategy, on the schedule that suits it better over all, a column a net: mean points over budgets, ± over seeds."""
    nets = list(dict.fromkeys(row.net for row in rows))
    better: dict[str, str] = {}
    for strategy, schedule, *_ in overall(rows):  # the better one first
        better.setdefault(strategy, schedule)
    means = {(strategy, schedule): told for strategy, schedule, *told in overall(rows)}
    lines = []
    for strategy, schedule in better.items():
        cells = []
        for net in nets:
            own = [r for r in rows if (r.net, r.strategy, r.schedule) == (net, strategy, schedule)]
            reached = any(not row.refusal for row in own)
            cells.append("{:+.1f} ± {:.1f}".format(*_mean_points(own, rows)) if reached else "–")
        mean, spread, _ = means[strategy, schedule]
        lines.append([strategy, schedule, *cells, f"{mean:+.2f} ± {spread:.2f}"])
    headers = ["strategy", "schedule", *(f"{net} ({_base(rows, net):.0%})" for net in nets), "mean"]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def _mean_points(own: Sequence[Row], rows: Sequence[Row]) -> tuple[float, float]:
    """Mean over `own` and its deviation over seeds; the worst of `rows` where a budget isn't reached that somebody reaches."""
    worst: dict[Any, float] = {}
    for row in rows:
        if not row.refusal:
            key = (row.net, row.seed, row.budget)
            worst[key] = min(worst.get(key, 0.0), 100 * (row.score - row.base))
    points: dict[int, list[float]] = {}
    for row in own:
        key = (row.net, row.seed, row.budget)
        if key in worst:
            lost = worst[key] if row.refusal else 100 * (row.score - row.base)
            points.setdefault(row.seed, []).append(lost)
    means = [statistics.fmean(values) for values in points.values()]
    return statistics.fmean(means) if means else 0.0, statistics.stdev(means) if len(means) > 1 else 0.0


def _base(rows: Sequence[Row], net: str) -> float:
    return statistics.fmean({row.seed: row.base for row in rows if row.net == net}.values())


def _is_for_all(rows: Sequence[Row], net: str) -> bool:
    """Whether every strategy has scores on it."""
    having = {row.strategy for row in rows if row.net == net and not row.refusal}
    return having == {row.strategy for row in rows}


def markdown(rows: Sequence[Row]) -> str:
    """A line a strategy and schedule over all nets, a column a net on the better schedule, then a table a net."""
    seeds = len({row.seed for row in rows})
    lines = [
        [strategy, schedule, f"{mean:+.2f} ± {spread:.2f}", missed or ""]
        for strategy, schedule, mean, spread, missed in overall(rows)
    ]
    parts = [
        tabulate(lines, ["strategy", "schedule", "points", "not reached"], tablefmt="github", disable_numparse=True),
        f"points of score against the original, mean over nets and budgets, ± deviation over {seeds} seeds; budgets not "
        f"reached count as the worst reached there",
        "",
        by_net(rows),
    ]
    budgets = sorted({row.budget for row in rows}, reverse=True)
    by_key = {(s.net, s.strategy, s.schedule, s.budget): s for s in summaries(rows)}
    for net in dict.fromkeys(row.net for row in rows):
        lines = []
        for strategy, schedule in dict.fromkeys((row.strategy, row.schedule) for row in rows if row.net == net):
            cells = [by_key.get((net, strategy, schedule, budget)) for budget in budgets]
            if any(cell is not None and cell.reached for cell in cells):
                told = [f"{c.points:+.1f} ± {c.spread:.1f}" if c is not None and c.reached else "–" for c in cells]
                lines.append([strategy, schedule, *told])
        headers = [f"{net}, {_base(rows, net):.1%}", "", *(f"{budget:g}" for budget in budgets)]
        parts += ["", tabulate(lines, headers, tablefmt="github", disable_numparse=True)]
    return "\n".join(parts)


def draw(rows: Sequence[Row], file: Path) -> None:
    """Score against FLOPs, a panel a net, a line a strategy on the schedule that is its better one there; the spread as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    nets = list(dict.fromkeys(row.net for row in rows))
    columns = min(3, len(nets))
    lines = -(-len(nets) // columns)
    figure, panels = pyplot.subplots(
        lines, columns, figsize=(5.4 * columns, 4.2 * lines), layout="constrained", squeeze=False
    )
    found = summaries(rows)
    strategies = list(dict.fromkeys(row.strategy for row in rows))
    for axes, net in zip(panels.flat, nets, strict=False):
        for number, strategy in enumerate(strategies):
            own = _better(found, net, strategy)
            if not own:
                continue
            axes.errorbar(
                [s.budget for s in own],
                [100 * s.score for s in own],
                [s.spread for s in own],
                label=f"{strategy} ({own[0].schedule})",
                color=f"C{number % 10}",
                linestyle="-" if number < 10 else "--",
                marker="o" if strategy == "gtp" else ".",
                linewidth=2.5 if strategy == "gtp" else 1.2,
                capsize=2,
            )
        axes.axhline(100 * _base(rows, net), color="0.5", linewidth=1)
        axes.set(title=net, xlabel="FLOPs, of the original's", ylabel="score, %")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    for axes in list(panels.flat)[len(nets) :]:
        axes.set_axis_off()
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def _better(found: Sequence[Summary], net: str, strategy: str) -> list[Summary]:
    """Of the schedules, the one with more budgets reached, and then the higher mean."""
    curves = {
        schedule: [s for s in found if (s.net, s.strategy, s.schedule) == (net, strategy, schedule) and s.reached]
        for schedule in dict.fromkeys(s.schedule for s in found)
    }
    return max(curves.values(), key=lambda own: (len(own), sum(s.points for s in own)))
