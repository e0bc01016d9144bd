"""Tables and curves of `bench.accuracy`'s rows, in points of score lost."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from bench.contenders import CHOSEN
from gtp_fx.options.options import DEFAULTS

if TYPE_CHECKING:
    from bench.accuracy import Row


@dataclass(frozen=True)
class Summary:
    """One curve at one budget, summarised over seeds.

    net, strategy, schedule: name the curve.
    budget: FLOPs budget, as a share of the original's.
    points: mean score minus the original's, in percentage points.
    spread: standard deviation of the points.
    score: mean score, in [0, 1].
    reached: number of seeds with a score; 0 where all were refused.
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
    """Return a summary for each curve and budget, in the order of the rows."""
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
    """Return (strategy, schedule, mean points, deviation, refused rows) for each pair, the best first.

    The mean is over nets, budgets and seeds, the deviation is that of the mean over seeds. Nets that some strategy
    refuses at every budget are left out, unless that leaves none. Where a strategy can't reach a budget, it gets the
    worst points that any strategy reached there, so that a refusal is no advantage.
    """
    nets = {row.net for row in rows}
    shared = {net for net in nets if _is_for_all(rows, net)} or nets
    found = []
    for strategy, schedule in dict.fromkeys((row.strategy, row.schedule) for row in rows):
        own = [r for r in rows if (r.strategy, r.schedule) == (strategy, schedule) and r.net in shared]
        found.append((strategy, schedule, *_mean_points(own, rows), sum(bool(r.refusal) for r in own)))
    return sorted(found, key=lambda line: -line[2])


def by_net(rows: Sequence[Row]) -> str:
    """Return a table of mean points over budgets ± deviation over seeds: a line per strategy, a column per net.

    A strategy is listed on the schedule with the better overall mean.
    """
    nets = list(dict.fromkeys(row.net for row in rows))
    better: dict[str, str] = {}
    for strategy, schedule, *_ in overall(rows):  # the better one first
        better.setdefault(strategy, schedule)
    means = {(strategy, schedule): figures for strategy, schedule, *figures in overall(rows)}
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
    """Return the mean points of `own` and their deviation over seeds.

    Where a row of `own` is refused, but another of `rows` isn't, the worst points of `rows` at that budget count.
    """
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
    """Return the original's mean score over seeds."""
    return statistics.fmean({row.seed: row.base for row in rows if row.net == net}.values())


def _is_for_all(rows: Sequence[Row], net: str) -> bool:
    """Return whether every strategy has a score on this net."""
    having = {row.strategy for row in rows if row.net == net and not row.refusal}
    return having == {row.strategy for row in rows}


def markdown(rows: Sequence[Row]) -> str:
    """Return the report in Markdown: a table over all nets, one with a column per net, and one for each net."""
    seeds = len({row.seed for row in rows})
    lines = [
        [strategy, schedule, f"{mean:+.2f} ± {spread:.2f}", missed or ""]
        for strategy, schedule, mean, spread, missed in overall(rows)
    ]
    parts = [
        tabulate(lines, ["strategy", "schedule", "points", "not reached"], tablefmt="github", disable_numparse=True),
        f"points of score against the original, mean over nets and budgets, ± deviation over {seeds} seeds; budgets "
        f"not reached count as the worst reached there",
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
                texts = [f"{c.points:+.1f} ± {c.spread:.1f}" if c is not None and c.reached else "–" for c in cells]
                lines.append([strategy, schedule, *texts])
        headers = [f"{net}, {_base(rows, net):.1%}", "", *(f"{budget:g}" for budget in budgets)]
        parts += ["", tabulate(lines, headers, tablefmt="github", disable_numparse=True)]
    if any(row.strategy == CHOSEN for row in rows):
        parts += ["", hindsight(rows)]
    return "\n".join(parts)


def hindsight(rows: Sequence[Row]) -> str:
    """Return a table of what strategy="auto" keeps beside the best other, net by net: a column a budget.

    The best is the curve with the highest mean score over seeds at that budget, which nobody knows beforehand. Of many
    curves that are equally good the highest is above the truth, by about as much as scores scatter.
    """
    found = [s for s in summaries(rows) if s.reached]
    budgets = sorted({s.budget for s in found if s.strategy == CHOSEN}, reverse=True)
    lines = []
    for net in dict.fromkeys(s.net for s in found if s.strategy == CHOSEN):
        cells = []
        for budget in budgets:
            here = [s for s in found if (s.net, s.budget) == (net, budget)]
            own = next((s for s in here if s.strategy == CHOSEN), None)
            best = max((s for s in here if s.strategy != CHOSEN), key=lambda s: s.score, default=None)
            if own is None or best is None:
                cells.append("–")
            else:
                cells.append(f"{own.points:+.1f}; {best.points:+.1f} ({best.strategy}, {best.schedule})")
        lines.append([net, *cells])
    headers = ["auto; the best in hindsight", *(f"{budget:g}" for budget in budgets)]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def draw(rows: Sequence[Row], file: Path) -> None:
    """Draw score against FLOPs to `file`: a panel per net, a line per strategy, the spread over seeds as error bars.

    A strategy is drawn on the schedule that is better on that net.
    """
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
                marker="o" if strategy == DEFAULTS["strategy"] else ".",
                linewidth=2.5 if strategy == DEFAULTS["strategy"] else 1.2,
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
    """Return a strategy's curve on the schedule that reaches more budgets, or, if equal, has the higher mean."""
    curves = {
        schedule: [s for s in found if (s.net, s.strategy, s.schedule) == (net, strategy, schedule) and s.reached]
        for schedule in dict.fromkeys(s.schedule for s in found)
    }
    return max(curves.values(), key=lambda own: (len(own), sum(s.points for s in own)))
