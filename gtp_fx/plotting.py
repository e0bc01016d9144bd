"""Pictures of plans: tokens per block, for several budgets and targets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gtp_fx.errors import OptionError
from gtp_fx.forecast import Forecast


def plot_tokens(forecasts: Sequence[Forecast], title: str, file: Path) -> None:
    """Draw the share of its tokens that each block's later half (its MLP) works on, a line a forecast, to a PNG.

    Raises OptionError where matplotlib isn't installed or the file's kind is none that it writes.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise OptionError(
            f"plots need matplotlib, which can't be imported ({error}); pip install 'gtp-fx[plot]'"
        ) from error
    figure, axes = pyplot.subplots(figsize=(9, 5.4), layout="constrained")
    targets = list(dict.fromkeys(found.target for found in forecasts))
    styles = ["-", "--", ":", "-."]
    budgets = list(dict.fromkeys(found.budget for found in forecasts))
    for found in forecasts:
        rows = [row for row in found.blocks if row.block >= 0]
        kept = [
            1 - (found.tokens_gone(row.block) / max(whole, 1))
            for row, whole in zip(rows, found.schedule.tokens, strict=True)
        ]
        axes.step(
            [row.block for row in rows],
            kept,
            where="mid",
            color=f"C{budgets.index(found.budget) % 10}",
            linestyle=styles[targets.index(found.target) % len(styles)],
            label=f"{found.budget}, {found.target}: {found.flops_ratio:.3f} of FLOPs, {found.speed_up:.2f}× predicted",
        )
    axes.set(xlabel="attention block", ylabel="share of patch tokens that go on", ylim=(0, 1.05), title=title)
    axes.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside lower center", ncols=1 if len(forecasts) < 4 else 2)
    try:
        figure.savefig(file, dpi=150)
    except ValueError as error:
        raise OptionError(f"--plot {file}: {error}") from error
    finally:
        pyplot.close(figure)
