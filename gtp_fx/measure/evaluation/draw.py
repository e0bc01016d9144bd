"""The picture of an evaluation: accuracy against time, a line per strategy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gtp_fx.errors import OptionError
from gtp_fx.measure.evaluation.found import Outputs, Sums
from gtp_fx.measure.evaluation.intervals import Estimate
from gtp_fx.measure.evaluation.rows import About, Row
from gtp_fx.report.plots import matplotlib_pyplot, save


def draw(about: About, everything: Sequence[Row], file: Path) -> None:
    """Draw accuracy against time to `file`, with 95 % intervals and quartiles as bars.

    Accuracy is top-1; without labels the share of images with the original's class; of features their cosine. Time is
    the original's share; where none was measured, FLOPs stand in its place.

    Raises OptionError where matplotlib isn't installed, can't write such a file, or nothing was evaluated.
    """
    rows = [row for row in everything if row.sums is not None]
    if not rows:
        raise OptionError("there is nothing to draw: no row was evaluated")
    pyplot = matplotlib_pyplot()
    figure, axes = pyplot.subplots(figsize=(7.5, 5), layout="constrained")
    is_timed = all(row.times is not None for row in rows)
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(row.asked.get("strategy", row.name), []).append(row)
    for number, (strategy, own) in enumerate(lines.items()):
        points = sorted(((*_across(row, is_timed), _upward(row.sums, about)) for row in own if row.sums), key=_x)
        axes.errorbar(
            [x for x, _, _ in points],
            [100 * y.value for _, _, y in points],
            yerr=_bars([(y.value, y.low, y.high) for _, _, y in points], 100),
            xerr=_bars([(x, *ends) for x, ends, _ in points]),
            label=strategy,
            color=f"C{number % 10}",
            marker="o",
            capsize=2,
        )
    original = rows[0].sums.original[0] if rows[0].sums is not None and not about.unlabelled else None
    height = 100 if original is None else 100 * original.value
    axes.plot([1], [height], marker="s", color="0.3", linestyle="none", label="original")
    axes.axhline(height, color="0.6", linewidth=1)
    how = f"{about.run['how']} against {about.run['how']}"
    axes.set(
        title=f"{about.model}, {about.images} images",
        xlabel=f"time, of the original's ({how})" if is_timed else "FLOPs, of the original's",
        ylabel=_named(about),
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    save(figure, file)


def _across(row: Row, is_timed: bool) -> tuple[float, tuple[float, float]]:
    """Return a row's share of the original's time and its quartiles; of the FLOPs where there are no times."""
    if not is_timed or row.times is None:
        return row.flops_ratio, (row.flops_ratio, row.flops_ratio)
    gain = row.times.speed_up
    return 1 / gain.median, (1 / gain.upper, 1 / gain.lower)


def _upward(sums: Sums, about: About) -> Estimate:
    """Return what is drawn upward; accuracy with the interval of what it has changed, on the same images."""
    if not about.unlabelled:
        before, gained = sums.original[0].value, sums.gained
        return Estimate(before + gained.value, before + gained.low, before + gained.high)
    return sums.agreement if about.outputs is Outputs.classes else sums.mean_cosine


def _named(about: About) -> str:
    if not about.unlabelled:
        return "top-1, % (bars: 95 % of the change on the same images)"
    is_classes = about.outputs is Outputs.classes
    return "same class as the original, %" if is_classes else "cosine with the original's features, %"


def _x(point: Any) -> float:
    return float(point[0])


def _bars(values: list[tuple[float, float, float]], factor: float = 1) -> list[list[float]]:
    """Return how far the ends of intervals are below and above the values; 0 where an end is unknown."""
    below = [factor * max(0.0, value - low) for value, low, _ in values]  # max(0.0, nan) is 0.0
    return [below, [factor * max(0.0, high - value) for value, _, high in values]]
