"""Canvases of each net's task with their labels, to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.digit_nets import NetConfig
from bench.digits import Split
from bench.tasks import TASKS


def draw_sheet(configs: Sequence[NetConfig], file: Path, columns: int = 6) -> None:
    """A row of canvases a net, each with its label; a patch that shows a digit is framed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(
        len(configs), columns, figsize=(1.8 * columns, 2.0 * len(configs)), squeeze=False, layout="constrained"
    )
    for config, row in zip(configs, rows, strict=True):
        images, labels = TASKS[config.task].draw(Split.test, 1, columns, config.look, config.patch)
        for axes, image, label in zip(row, images, labels, strict=True):
            axes.imshow(image[0], cmap="gray")
            axes.set(xticks=[], yticks=[], title=f"{config.task}: {int(label.max()) - label.ndim}")
            for at in label.nonzero().flatten().tolist() if label.ndim else []:
                down, across = divmod(at, config.look.side // config.patch)
                corner = (across * config.patch - 0.5, down * config.patch - 0.5)
                axes.add_patch(pyplot.Rectangle(corner, config.patch, config.patch, fill=False, edgecolor="C1"))
    figure.savefig(file, dpi=100)
    pyplot.close(figure)
