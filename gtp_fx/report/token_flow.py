"""Token flow: what happens to one image's tokens, site by site.

At a site that removes tokens: which patches are kept, which are removed, which tokens receive those, and how many
patches each kept token then stands for. Where the grid has to stay whole: which patches skip the site's branch, or are
in windows that rest. `Provenance` has the result after the last site; this has the steps in between, for a picture.
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
from gtp_fx.ops.token_graph import place_numbers
from gtp_fx.report.provenance import SiteRecord, calls_of
from gtp_fx.report.report import SiteRow
from gtp_fx.types.places import home_of


@dataclass(frozen=True, eq=False)
class SiteView:
    """One image's tokens at a site that removes some.

    layer: the site's layer.
    grid: sides of the stream's grid; patches are numbered row-major.
    kept: [K], the patches that remain, in the stream's order.
    removed: [P], the patches that this site removes, in the stream's order.
    shares: [K, P], how much of each removed token each kept one receives; None where removed tokens are dropped.
    scale: [K], how many patches each kept token stands for after the site. That is its token scale; where kept tokens
        become averages, whose shares aren't counts, it is the number of patches in the average, each removed token
        counting as one in total.
    """

    layer: str
    grid: tuple[int, ...]
    kept: Tensor
    removed: Tensor
    shares: Tensor | None
    scale: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values; `received_by` lists, for each removed patch, the patches that receive some of it."""
        found = {
            "layer": self.layer,
            "grid": list(self.grid),
            "kept": self.kept.tolist(),
            "removed": self.removed.tolist(),
        }
        to = None
        if self.shares is not None:
            to = [self.kept[column > 0].tolist() for column in self.shares.T]
        return {**found, "received_by": to, "scale": self.scale.tolist()}


@dataclass(frozen=True, eq=False)
class SkipView:
    """One image's tokens at a site where all tokens stay in the stream and some skip the branch.

    layer: the site's layer.
    grid: sides of the image's grid; patches are numbered row-major.
    skipped: [P], the patches that skip the branch, ascending. Padding that skips is not among them.
    """

    layer: str
    grid: tuple[int, ...]
    skipped: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return {"layer": self.layer, "grid": list(self.grid), "skipped": self.skipped.tolist()}


@dataclass(frozen=True, eq=False)
class RestView:
    """One image's tokens at a site where windows rest.

    layer: the site's layer.
    grid: sides of the image's grid; patches are numbered row-major.
    cells: [G], which cell each patch of a window that rests is in, numbered through all of these; -1 where it is awake.
    """

    layer: str
    grid: tuple[int, ...]
    cells: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return {"layer": self.layer, "grid": list(self.grid), "cells": self.cells.tolist()}


View = SiteView | SkipView | RestView


@torch.no_grad()
def token_flow(
    gm: fx.GraphModule, records: Sequence[SiteRecord], rows: Sequence[SiteRow], image: Tensor
) -> tuple[View, ...]:
    """Run an optimised graph eagerly on one image; return one view per site, in graph order.

    records: the graph's sites that remove tokens.
    rows: all of the report's sites; where windows rest and their cells aren't run (`rest_share=0`), there is no view.
    image: [1, …], as the model takes it.

    Raises OptionError where the graph has no site.
    """
    if not rows:
        raise OptionError("no token leaves at this budget, so there is nothing to draw: give a lower one")
    nodes = calls_of(gm.graph)
    skips, rests = _skipping(nodes), _resting(nodes)
    if not rests and all(row.window_tokens for row in rows):
        raise OptionError("windows rest here without their cells (rest_share=0), and no picture is drawn of that")

    def wanted(copies: dict[fx.Node, fx.Node]) -> list[fx.Node]:
        calls = [copies[node] for node in nodes]
        of_skips = (value for number in skips for value in _places_and_skipped(calls[number]))
        return [*_values(records, calls), *of_skips, *(n for number in rests for n in calls[number].all_input_nodes)]

    # One run gives all values; the sites that remove tokens take theirs first, then those with branches.
    found = iter(returning(gm, wanted)(image))
    views = dict(_removing_views(records, nodes, found, image.device))
    skipping = (row for row in rows if row.windows)
    for number, row in zip(skips, skipping, strict=True):
        skipped = _patches(next(found), next(found), shape := _grid_of(nodes[number]))
        views[number] = SkipView(row.layer, shape, skipped)
    for number, row in zip(rests, (row for row in rows if rests and row.window_tokens), strict=True):
        rank, window, cell, patch = (next(found) for _ in range(4))
        views[number] = _rest_view(row.layer, nodes[number], rank[window], cell, patch)
    return tuple(views[place] for place in sorted(views))


def _removing_views(
    records: Sequence[SiteRecord], nodes: Sequence[fx.Node], found: Iterator[Tensor], device: torch.device
) -> Iterator[tuple[int, View]]:
    """Yield the views of sites that remove tokens, each with its call's number.

    found: the values of the nodes that `_values` returns, in that order.
    """
    streams: dict[Any, tuple[Tensor, Tensor]] = {}
    for record in records:
        count = math.prod(record.grid.shape)
        # The tokens that remain after the stream's earlier sites: their places on the grid [n] and their scales [n].
        everything = torch.arange(count, device=device), torch.ones(count, device=device)
        index, scale = everything if record.of_whole else streams.get(record.grid, everything)
        kept = next(found)[0]
        removed = torch.ones_like(index, dtype=torch.bool).index_fill(0, kept, False).nonzero()[:, 0]
        # Kept tokens gain the scales of what they receive. The site's own order of removed tokens becomes ascending.
        shares, new_scale = None, scale[kept]
        if record.weights is not None:
            received, weights = next(found)[0], next(found)[0].float()
            shares = record.alpha * weights
            new_scale = new_scale + (shares if record.own is None else _split(shares)) @ scale[received]
            shares = shares[:, received.argsort()]
        streams[record.grid] = index[kept], new_scale
        layer, home = layer_name(nodes[record.place]), home_of(record.grid)
        number = torch.arange(count, device=device)
        if record.places is not None:
            number = place_numbers(next(found), home.sides)[0]
        patches = number[index[kept]], number[index[removed]]
        yield record.place, SiteView(layer, home.shape, *patches, shares, new_scale)


def _split(shares_KP: Tensor) -> Tensor:
    """Scale each removed token's shares [K, P] so that they sum to one."""
    return shares_KP / shares_KP.sum(dim=0).clamp_min(1e-12)


def _values(records: Sequence[SiteRecord], calls: Sequence[fx.Node]) -> list[fx.Node]:
    """Return the sites' nodes as one list: kept, removed and weights where a site passes tokens on, and places."""
    wanted: list[int | None] = []
    for record in records:
        wanted.append(record.kept)
        if record.weights is not None:
            wanted += [record.removed, record.weights]
        wanted.append(record.places)
    return [calls[number] for number in wanted if number is not None]


def _skipping(nodes: Sequence[fx.Node]) -> list[int]:
    """Return the number of the first call of each site that says which tokens skip; a branch may have several parts."""
    calls = {
        n: node for n, node in enumerate(nodes) if node.target in (gtp_fx.region_shares.default, gtp_fx.idle.default)
    }
    first: dict[fx.Node, int] = {}
    for number, node in calls.items():
        first.setdefault(_places_and_skipped(node)[1], number)
    return list(first.values())


def _resting(nodes: Sequence[fx.Node]) -> list[int]:
    """Return the number of each call that says which cell a token of a window that rests is in."""
    return [n for n, node in enumerate(nodes) if node.target is gtp_fx.cell_numbers.default]


def _rest_view(layer: str, call: fx.Node, rank_T: Tensor, cell_T: Tensor, patch_T: Tensor) -> RestView:
    """Return the view of a site from operands of its `cell_numbers`.

    rank_T: which of the windows that rest each token's is; -1 where it is awake.
    """
    numbers: tuple[Any, ...] = call.args
    *_, cells, sides = numbers
    number_T = torch.where((rank_T >= 0) & (cell_T >= 0), rank_T * cells + cell_T, -1)
    return RestView(layer, tuple(sides), torch.empty_like(number_T).scatter(0, patch_T, number_T))


def _places_and_skipped(call: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Return the places of each window's tokens and which of them skip: operands of `region_shares` or `idle`."""
    operands: Any = call.args[-3:] if call.target is gtp_fx.region_shares.default else call.args[1:4]
    places, _, skipped = operands
    return places, skipped


def _grid_of(call: fx.Node) -> tuple[int, ...]:
    """Return the sides of the image grid whose places a call of `region_shares` or `idle` reads."""
    node = _places_and_skipped(call)[0]
    while node.target is not gtp_fx.grid_places.default:
        node = node.all_input_nodes[0]
    shape: Any = node.args[0]
    return tuple(shape)


def _patches(places_WnR: Tensor, skipped_WP: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the patches of one image that skip, as row-major numbers on its grid, ascending: [P].

    places_WnR: coordinates of each window's tokens; padding has negative ones and is dropped.
    skipped_WP: indices of the tokens of each window that skip.
    """
    index_WPR = skipped_WP[..., None].expand(*skipped_WP.shape, len(shape))
    places_PR = places_WnR.gather(1, index_WPR).flatten(0, 1)
    inside_PR = places_PR[(places_PR >= 0).all(dim=1)]
    number_P = torch.zeros(len(inside_PR), dtype=torch.int64, device=inside_PR.device)
    for side, column in zip(shape, inside_PR.T, strict=True):
        number_P = number_P * side + column
    return number_P.sort().values
