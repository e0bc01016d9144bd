"""Where an image's tokens went: at each site, which patches are left, which leave, who receives those and what each then stands for; or,
where the grid has to stay whole, which skip the site's branch.

`Provenance` says what the last tokens are made of; this is how it came to that, site by site, for a picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.ops import gtp_fx  # type: ignore[import-not-found]

from gtp_fx.errors import OptionError
from gtp_fx.graph.edit import returning
from gtp_fx.graph.nodes import layer_name
from gtp_fx.report.provenance import SiteRecord, calls_of
from gtp_fx.report.report import SiteRow


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


@dataclass(frozen=True, eq=False)
class SkipView:
    """One site, of one image, that all tokens stay in. skipped [P]: patches of the grid, ascending, that its branch is spared.
    Padding that skips is nobody's patch."""

    layer: str
    grid: tuple[int, ...]
    skipped: Tensor

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"layer": self.layer, "grid": list(self.grid), "skipped": self.skipped.tolist()}


View = SiteView | SkipView


@torch.no_grad()
def token_flow(
    gm: fx.GraphModule, records: Sequence[SiteRecord], rows: Sequence[SiteRow], image: Tensor
) -> tuple[View, ...]:
    """Follow one image's tokens through an optimised graph, run eagerly: a view a site, in the order of the graph.

    records, rows: the graph's sites, as provenance and the report know them. image: [1, …] as the model takes it.

    Raises OptionError where nothing happens to any token at this budget.
    """
    if not rows:
        raise OptionError("no token leaves at this budget, so there is nothing to draw: give a lower one")
    nodes = calls_of(gm.graph)
    skips = [number for number, node in enumerate(nodes) if node.target is gtp_fx.region_shares.default]

    def wanted(copies: dict[fx.Node, fx.Node]) -> list[fx.Node]:
        calls = [copies[node] for node in nodes]
        return [*_values(records, calls), *(value for number in skips for value in _places_and_left(calls[number]))]

    found = iter(returning(gm, wanted)(image))
    views = dict(_leaving(records, nodes, found, image.device))
    skipping = (row for row in rows if row.windows)
    for number, row in zip(skips, skipping, strict=True):
        skipped = _patches(next(found), next(found), shape := _grid_of(nodes[number]))
        views[number] = SkipView(row.layer, shape, skipped)
    return tuple(views[place] for place in sorted(views))


def _leaving(
    records: Sequence[SiteRecord], nodes: Sequence[fx.Node], found: Iterator[Tensor], device: torch.device
) -> Iterator[tuple[int, View]]:
    """Sites that tokens leave their stream at, by their places. found: what `_values` has asked for."""
    streams: dict[Any, tuple[Tensor, Tensor]] = {}
    for record in records:
        count = math.prod(record.grid.shape)
        everything = torch.arange(count, device=device), torch.ones(count, device=device)
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
        layer = layer_name(nodes[record.place])
        yield record.place, SiteView(layer, record.grid.shape, index[kept], index[left], shares, then)


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


def _places_and_left(shares: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Of a call of `region_shares`: where a window's tokens stand on the image, and which of them skip."""
    places, _, left = shares.all_input_nodes
    return places, left


def _grid_of(shares: fx.Node) -> tuple[int, ...]:
    """Rows and columns of the image whose places a call of `region_shares` is given."""
    node = shares
    while node.target is not gtp_fx.grid_places.default:
        node = node.all_input_nodes[0]
    shape: Any = node.args[0]
    return tuple(shape)


def _patches(places_WnR: Tensor, removed_WP: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[P]: by number on the grid, row-major, ascending; of the tokens of one image's windows that aren't padding, which stands at
    negative places."""
    index_WPR = removed_WP[..., None].expand(*removed_WP.shape, len(shape))
    places_PR = places_WnR.gather(1, index_WPR).flatten(0, 1)
    inside_PR = places_PR[(places_PR >= 0).all(dim=1)]
    number_P = torch.zeros(len(inside_PR), dtype=torch.int64, device=inside_PR.device)
    for side, column in zip(shape, inside_PR.T, strict=True):
        number_P = number_P * side + column
    return number_P.sort().values
