"""Pictures for `gtp-fx show`: what happened to a photograph's tokens, one panel per site and a summary per grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gtp_fx.errors import OptionError
from gtp_fx.report.plots import matplotlib_pyplot, save
from gtp_fx.report.token_flow import RestView, SiteView, SkipView, View

_REMOVED_EARLIER = (1.0, 1.0, 1.0, 0.82)
"""RGBA of patches that an earlier site removed: a white veil."""
_REMOVED_HERE = (0.85, 0.1, 0.1, 0.55)
"""RGBA of patches that this site removes, or that skip its branch: red."""
_COLUMNS = 4
_FAINTEST = 0.15
"""Smallest share that is drawn, relative to the token's largest.

A mixed graph gives a token sixteen neighbours, most of them far away; their lines would hide the picture.
"""


def draw_token_flow(views: Sequence[View], picture: Tensor, title: str, file: Path, columns: int = _COLUMNS) -> None:
    """Draw each site over the picture, then a summary of each grid, to a file.

    Patches that a site removes are red, with lines to the tokens that receive them; patches removed earlier are white.
    Patches that skip a site's branch are red as well, and windows that rest are seen as their cells. The summary of a
    grid shows how many patches each remaining token stands for, or at how many sites each patch skipped, where the grid
    has several.

    picture: [height, width, 3], values in [0, 1].
    columns: panels side by side, at most.

    Raises OptionError where a stream's grid isn't two-dimensional (video, audio), where matplotlib isn't installed, or
    where it can't write files of this suffix.
    """
    for view in views:
        if len(view.grid) != 2:
            raise OptionError(
                f"{view.layer}'s tokens stand on a grid of {' x '.join(map(str, view.grid))}, "
                f"which isn't that of an image; only tokens on two-dimensional grids can be drawn"
            )
    removing = [view for view in views if isinstance(view, SiteView)]
    skipping = [view for view in views if isinstance(view, SkipView)]
    pyplot = matplotlib_pyplot()
    # A grid's last site has the final token scales. Counting skips says something only where a grid has several sites.
    last = {view.grid: view for view in removing}.values()
    shared = [
        [view for view in skipping if view.grid == grid] for grid in dict.fromkeys(view.grid for view in skipping)
    ]
    counted = [sites for sites in shared if len(sites) > 1]
    # One panel for the picture itself, then the sites, then the summaries.
    panels = 1 + len(views) + len(last) + len(counted)
    columns = min(panels, columns)
    rows = math.ceil(panels / columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(3.6 * columns, 3.9 * rows), squeeze=False, layout="constrained"
    )
    legend = ["red: removed here; yellow: to the tokens that receive it; white: removed earlier"] if removing else []
    legend += ["red: skips this branch"] if skipping else []
    legend += ["coarse: rests as its cells"] if any(isinstance(view, RestView) for view in views) else []
    figure.suptitle("\n".join([title, *legend]), fontsize=10)
    axes = iter(grid.flat)
    _panel(next(axes), picture, "what the model sees")
    for view in views:
        if isinstance(view, SiteView):
            _site(next(axes), view, picture)
        elif isinstance(view, SkipView):
            _skips(next(axes), view, picture)
        else:
            _rests(next(axes), view, picture)
    for site in last:
        _scales(figure, next(axes), site, picture)
    for sites in counted:
        _skipped(figure, next(axes), sites, picture)
    for rest in axes:
        rest.set_axis_off()
    save(figure, file)


def _panel(axes: Any, picture: Tensor, title: str) -> None:
    """Draw the picture under a title, without axes."""
    axes.imshow(picture.numpy())
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


def _site(axes: Any, view: SiteView, picture: Tensor) -> None:
    """Draw one site that removes tokens: the veils, and lines from removed patches to those that receive them."""
    from matplotlib.collections import LineCollection

    passed = "dropped" if view.shares is None else "passed on"
    _panel(axes, picture, f"{view.layer}: {len(view.removed)} {passed}, {len(view.kept)} kept")
    veil = np.tile(np.array(_REMOVED_EARLIER), (math.prod(view.grid), 1))
    veil[view.kept.cpu().numpy()] = 0
    veil[view.removed.cpu().numpy()] = _REMOVED_HERE
    _over(axes, veil, view, picture)
    if view.shares is None:
        return
    places = _centres(view.grid, picture)
    sources, sinks = places[view.removed.cpu().numpy()], places[view.kept.cpu().numpy()]
    # [P, K], relative to each removed token's largest share, so that a line's opacity compares its receivers.
    shares = (view.shares / view.shares.amax(dim=0).clamp_min(1e-12)).T.cpu().numpy()
    lines, colours = [], []
    for source, row in zip(sources, shares, strict=True):
        for sink in np.flatnonzero(row > _FAINTEST):
            lines.append((source, sinks[sink]))
            colours.append((1.0, 0.85, 0.0, 0.65 * float(row[sink])))
    axes.add_collection(LineCollection(lines, colors=colours, linewidths=0.7))


def _skips(axes: Any, view: SkipView, picture: Tensor) -> None:
    """Draw one site whose tokens skip a branch."""
    patches = math.prod(view.grid)
    _panel(axes, picture, f"{view.layer}: {len(view.skipped)} of {patches} skip the MLP")
    veil = np.zeros((patches, 4))
    veil[view.skipped.cpu().numpy()] = _REMOVED_HERE
    _over(axes, veil, view, picture)


def _rests(axes: Any, view: RestView, picture: Tensor) -> None:
    """Draw one site where windows rest: each of their cells in its mean colour."""
    cells = view.cells.cpu()
    resting = cells >= 0
    _panel(axes, picture, f"{view.layer}: {int(resting.sum())} of {len(cells)} rest")
    rows, columns = view.grid
    colours = F.adaptive_avg_pool2d(picture.permute(2, 0, 1), (rows, columns)).flatten(1).T.clamp(0, 1)
    veil = torch.zeros(len(cells), 4)
    for cell in cells[resting].unique():
        veil[cells == cell] = torch.cat([colours[cells == cell].mean(0), torch.ones(1)])
    _over(axes, veil.numpy(), view, picture)


def _scales(figure: Any, axes: Any, view: SiteView, picture: Tensor) -> None:
    """Draw the token scales after a grid's last site; removed patches stay blank."""
    field = np.full(math.prod(view.grid), np.nan)
    field[view.kept.cpu().numpy()] = view.scale.cpu().numpy()
    title = f"token scale, {float(view.scale.min()):.3g} – {float(view.scale.max()):.3g}"
    _field(figure, axes, field, view, picture, title)


def _skipped(figure: Any, axes: Any, views: Sequence[SkipView], picture: Tensor) -> None:
    """Draw, for each patch of one grid, at how many of the grid's sites it skipped the branch."""
    field = np.zeros(math.prod(views[0].grid))
    for view in views:
        field[view.skipped.cpu().numpy()] += 1
    rows, columns = views[0].grid
    title = f"skipped by each patch of {rows} × {columns}, of {len(views)} sites"
    _field(figure, axes, field, views[0], picture, title, range(len(views) + 1))


def _over(axes: Any, veil: Any, view: View, picture: Tensor) -> None:
    """Lay one colour per patch over the picture. veil: [G, 4], RGBA."""
    axes.imshow(veil.reshape(*view.grid, 4), extent=_extent(picture), interpolation="nearest")


def _field(
    figure: Any, axes: Any, field: Any, view: View, picture: Tensor, title: str, ticks: Sequence[int] | None = None
) -> None:
    """Lay one number per patch over the picture, with a colour bar. field: [G], NaN where nothing is drawn."""
    _panel(axes, picture, title)
    shown = axes.imshow(
        field.reshape(view.grid), extent=_extent(picture), interpolation="nearest", cmap="viridis", alpha=0.8
    )
    figure.colorbar(shown, ax=axes, location="bottom", fraction=0.05, pad=0.02, ticks=ticks)


def _extent(picture: Tensor) -> tuple[float, float, float, float]:
    """Left, right, bottom and top of the picture in pixels, as `imshow` takes them."""
    height, width = picture.shape[:2]
    return (-0.5, width - 0.5, height - 0.5, -0.5)


def _centres(grid: tuple[int, ...], picture: Tensor) -> Any:
    """Centre (x, y) of every patch in pixels: [G, 2]."""
    height, width = picture.shape[:2]
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    x = (columns + 0.5) * width / grid[1] - 0.5
    y = (rows + 0.5) * height / grid[0] - 0.5
    return np.stack([x.ravel(), y.ravel()], axis=-1)
