"""Plots of plans: tokens per block for several budgets and targets; tokens and times per block of one plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gtp_fx.errors import OptionError
from gtp_fx.report.forecast import Forecast


def plot_tokens(forecasts: Sequence[Forecast], title: str, file: Path) -> None:
    """Plot the share of tokens that each block's later half (its MLP) works on, one line per forecast.

    The file's suffix gives its format. Raises OptionError where matplotlib isn't installed or can't write that format.
    """
    pyplot = matplotlib_pyplot()
    figure, axes = pyplot.subplots(figsize=(9, 5.4), layout="constrained")
    # Colour tells budgets apart, line style tells targets apart.
    targets = list(dict.fromkeys(found.target for found in forecasts))
    styles = ["-", "--", ":", "-."]
    budgets = list(dict.fromkeys(found.budget for found in forecasts))
    for found in forecasts:
        axes.step(
            *_kept(found),
            where="mid",
            color=f"C{budgets.index(found.budget) % 10}",
            linestyle=styles[targets.index(found.target) % len(styles)],
            label=f"{found.budget}, {found.target}: {found.flops_ratio:.3f} of FLOPs, {found.speed_up:.2f}× predicted",
        )
    axes.set(xlabel="attention block", ylabel="share of patch tokens that go on", ylim=(0, 1.05), title=title)
    axes.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside lower center", ncols=1 if len(forecasts) < 4 else 2)
    save(figure, file)


def plot_blocks(found: Forecast, file: Path) -> None:
    """Plot one plan: each block's share of tokens in its later half, and its predicted time before and after.

    Raises OptionError where the folder doesn't exist, and where matplotlib isn't installed or can't write such a file.
    """
    must_have_folder(file)
    pyplot = matplotlib_pyplot()
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(9, 6.4), sharex=True, layout="constrained")
    figure.suptitle(
        f"{found.budget}: {found.flops_ratio:.3f} of the FLOPs, {found.speed_up:.2f}× predicted on {found.target} "
        f"for {found.batch} images"
    )
    blocks, kept = _kept(found)
    if blocks:
        above.bar(blocks, [1.0] * len(blocks), color="0.8")
        above.bar(blocks, kept, color="C0")
    above.set(ylabel="share of patch tokens\nthat go on", ylim=(0, 1.05))
    # Below: predicted times, in pairs of bars beside each block's number.
    numbers = [row.block for row in found.blocks]
    half = 0.4
    below.bar(
        [n - half / 2 for n in numbers],
        [row.before.seconds * 1e3 for row in found.blocks],
        half,
        color="0.8",
        label="every token (times: exact passes done)",
    )
    below.bar(
        [n + half / 2 for n in numbers],
        [row.after.seconds * 1e3 for row in found.blocks],
        half,
        color="C0",
        label="as planned",
    )
    below.set(ylabel="predicted ms", xlabel="attention block (first: what runs before; the last includes the head)")
    below.set_xticks(numbers, ["…" if number < 0 else str(number) for number in numbers])
    for axes in (above, below):
        axes.grid(alpha=0.3, axis="y")
        axes.set_axisbelow(True)
    figure.legend(fontsize="small", loc="outside lower center", ncols=2)  # beside the axes: no bar is hidden
    save(figure, file)


def matplotlib_pyplot() -> Any:
    """Import matplotlib.pyplot, set to draw to files alone. Raises OptionError where matplotlib isn't installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise OptionError(
            f"plots need matplotlib, which can't be imported ({error}); pip install matplotlib"
        ) from error
    return pyplot


def must_draw(file: Path | None) -> None:
    """Check, before any work is done, that a plot can be written to `file`; None stands for no plot.

    Raises OptionError where matplotlib isn't installed, can't write that suffix, or the folder doesn't exist.
    """
    if file is None:
        return
    must_have_folder(file)
    figure = matplotlib_pyplot().figure()
    kinds = figure.canvas.get_supported_filetypes()
    matplotlib_pyplot().close(figure)
    if file.suffix.removeprefix(".").lower() not in kinds:
        raise OptionError(
            f"plot {file}: Format {file.suffix.removeprefix('.')!r} is not supported; "
            f"give x.png, or {', '.join(sorted(kinds))}"
        )


def must_have_folder(file: Path | None) -> None:
    """Check that the folder of `file` exists. Raises OptionError where it doesn't."""
    if file is not None and not file.parent.is_dir():
        raise OptionError(f"{file}: {file.parent} is no directory; make it first")


def save(figure: Any, file: Path) -> None:
    """Write a figure to `file` and close it. Raises OptionError where matplotlib can't write such a file there."""
    try:
        figure.savefig(file, dpi=150)
    except OSError as error:
        raise OptionError(f"plot {file} can't be written: {error.strerror or error}") from error
    except ValueError as error:
        raise OptionError(f"plot {file}: {error}") from error
    finally:
        matplotlib_pyplot().close(figure)


def _kept(found: Forecast) -> tuple[list[int], list[float]]:
    """Return the blocks' numbers, and for each the share of tokens that its later half works on."""
    rows = [row.block for row in found.blocks if row.block >= 0]
    pairs = zip(rows, found.schedule.tokens, strict=True)
    return rows, [1 - found.tokens_removed(block) / max(whole, 1) for block, whole in pairs]
