"""Where an image's tokens went: at each site, which patches are left, which leave, who receives those and what each then stands for.

`Provenance` says what the last tokens are made of; this is how it came to that, site by site, for a picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from gtp_fx.errors import OptionError
from gtp_fx.graphs import layer_name, returning
from gtp_fx.model import OptimizedModel
from gtp_fx.provenance import SiteRecord, calls_of


@dataclass(frozen=True, eq=False)
class SiteView:
    """One site, of one image. grid: of its stream, row-major. kept [K], left [P]: patches of the grid, ascending, left just now.

    shares [K, P]: how much of each that left a kept one receives, 0 where nothing; None where those are dropped. scale [K]: how many
    patches each kept token stands for now: its token scale; where tokens become averages, in which shares say nothing of numbers, those
    that are in it, each counted once over all.
    """

    layer: str
    grid: tuple[int, ...]
    kept: Tensor
    left: Tensor
    shares: Tensor | None
    scale: Tensor

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; of the shares who receives them, by number of patch."""
        found = {"layer": self.layer, "grid": list(self.grid), "kept": self.kept.tolist(), "left": self.left.tolist()}
        to = None
        if self.shares is not None:
            to = [self.kept[column > 0].tolist() for column in self.shares.T]
        return {**found, "received_by": to, "scale": self.scale.tolist()}


@torch.no_grad()
def journeys(model: OptimizedModel, image: Tensor) -> tuple[SiteView, ...]:
    """Of one image, [1, …] as the model takes it; in the order of the graph, eager.

    Raises OptionError where no token leaves: nothing does at this budget, or they only skip branches within windows.
    """
    records, gm = model.sites, model.graph_module
    if not records:
        skipping = (
            "tokens only skip branches here, and stay where they are" if model.report.sites else "no token leaves"
        )
        raise OptionError(
            f"{type(model).__name__} at {model.report.flops_ratio:.3f} of its FLOPs: {skipping}, so there is nothing to draw"
        )
    runner = returning(gm, lambda copies: _values(records, [copies[node] for node in calls_of(gm.graph)]))
    found = iter(runner(image))
    nodes = calls_of(gm.graph)
    views: list[SiteView] = []
    streams: dict[Any, tuple[Tensor, Tensor]] = {}
    for record in records:
        count = math.prod(record.grid.shape)
        everything = torch.arange(count, device=image.device), torch.ones(count, device=image.device)
        index, scale = everything if record.of_whole else streams.get(record.grid, everything)
        kept = next(found)[0]
        left = torch.ones_like(index, dtype=torch.bool).index_fill(0, kept, False).nonzero()[:, 0]
        shares, then = None, scale[kept]
        if record.weights is not None:
            received, weights = next(found)[0], next(found)[0].float()
            shares = record.alpha * weights
            then = then + (shares if record.own is None else _split(shares)) @ scale[received]
            shares = shares[:, received.argsort()]
        streams[record.grid] = index[kept], then
        views.append(
            SiteView(layer_name(nodes[record.place]), record.grid.shape, index[kept], index[left], shares, then)
        )
    return tuple(views)


def _split(shares_KP: Tensor) -> Tensor:
    """Of each that left, one in all, in the proportions of its shares."""
    return shares_KP / shares_KP.sum(dim=0).clamp_min(1e-12)


def _values(records: Sequence[SiteRecord], calls: Sequence[fx.Node]) -> list[fx.Node]:
    """What the sites have computed, flat: kept, and where something is passed on, who leaves and by what weights."""
    wanted: list[int | None] = []
    for record in records:
        wanted.append(record.kept)
        if record.weights is not None:
            wanted += [record.propagated, record.weights]
    return [calls[number] for number in wanted if number is not None]
