"""The token graph: which tokens receive from which (arXiv 2311.03035, sparse graph construction).

Â = D^-1/2 A D^-1/2. A holds the spatial neighbours, the semantic ones or their union, and D the row degrees. Â is never
held as a matrix: spatial edges are computed from coordinates, semantic ones are M indices a token, and a site needs K x
P entries only.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gtp_fx.ops.autocast import without_autocast
from gtp_fx.ops.register import operator

GRAPHS = {
    "spatial": "the 8 neighbours on the grid (26 where it has three sides)",
    "semantic": "the M most cosine-similar tokens",
    "mixed": "the union of both (the paper's choice)",
}
"""Kinds of graph, by who the neighbours of a token are."""


def _graph_shapes(x_BNC, grid, prefix, kind, neighbors, places_BGR=None):  # type: ignore[no-untyped-def]
    batch, count = x_BNC.shape[0], _count(grid, places_BGR)
    near = x_BNC.new_empty(batch, count, 0 if kind == "spatial" else neighbors, dtype=torch.int64)
    return near, x_BNC.new_empty(batch, count, dtype=torch.float32)


def _weight_shapes(near_BGM, inv_sqrt_degree_BG, kept_BK, propagated_BP, grid, kind, places_BGR=None):  # type: ignore[no-untyped-def]
    return inv_sqrt_degree_BG.new_empty(*kept_BK.shape, propagated_BP.shape[1])


@operator(_graph_shapes)
def token_graph(
    x_BNC: Tensor, grid: list[int], prefix: int, kind: str, neighbors: int, places_BGR: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Build the graph over the patch tokens that enter the first block.

    x_BNC: [B, prefix + G (+ suffix), C].
    grid: the grid's sides; G is their product, row-major. A first side of -P counts P grids that are apart.
    prefix: tokens before the patches.
    kind: a name in `GRAPHS`.
    neighbors: M < G.
    places_BGR: [1 or B, G, R], where on the grid each of the G patches is, if they are in another order or fewer; from
        `grid_places`.

    Returns the semantic neighbours [B, G, M] (int64; M = 0 for a spatial graph) and D^-1/2 [B, G] (float32). A token
    without neighbours has no edges, and 0 in D^-1/2 instead of infinity.
    """
    batch, count = x_BNC.shape[0], _count(grid, places_BGR)
    here_BGR = coordinates(grid, x_BNC.device)[None] if places_BGR is None else places_BGR
    spatial_BGG = _adjacent(here_BGR[:, :, None], here_BGR[:, None, :])
    if kind == "spatial":
        near_BGM = torch.zeros(batch, count, 0, dtype=torch.int64, device=x_BNC.device)
        degree_BG = spatial_BGG.sum(dim=-1).float().expand(batch, count)
    else:
        near_BGM = _most_similar(x_BNC[:, prefix : prefix + count].detach(), neighbors)
        degree_BG = torch.full((batch, count), float(neighbors), device=x_BNC.device)
        if kind == "mixed":
            # Degrees of a union: neighbours of both kinds count once.
            both_BGM = _adjacent(here_BGR[:, :, None], taken_places(here_BGR, near_BGM))
            degree_BG = degree_BG + spatial_BGG.sum(dim=-1) - both_BGM.sum(dim=-1)
    return near_BGM, torch.where(degree_BG > 0, degree_BG.clamp(min=1.0).rsqrt(), 0.0)


@operator(_weight_shapes)
def propagation_weights(
    near_BGM: Tensor,
    inv_sqrt_degree_BG: Tensor,
    kept_BK: Tensor,
    propagated_BP: Tensor,
    grid: list[int],
    kind: str,
    places_BGR: Tensor | None = None,
) -> Tensor:
    """Compute Â[kept, removed], [B, K, P] in float32: how much of each propagated token a kept one receives.

    near_BGM, inv_sqrt_degree_BG: from `token_graph`.
    kept_BK, propagated_BP: indices into the whole grid, or into all patches of the stream where `places_BGR` is given.
    grid: the grid's sides in patches.
    kind: a name in `GRAPHS`.
    places_BGR: as in `token_graph`.
    """
    edge_BKP = torch.zeros(1, 1, 1, dtype=torch.bool, device=kept_BK.device)
    if kind != "semantic":
        here_BGR = coordinates(grid, kept_BK.device)[None] if places_BGR is None else places_BGR
        edge_BKP = _adjacent(
            taken_places(here_BGR, kept_BK)[:, :, None], taken_places(here_BGR, propagated_BP)[:, None, :]
        )
    if kind != "spatial":
        near_BKM = near_BGM.gather(1, kept_BK[..., None].expand(-1, -1, near_BGM.shape[-1]))
        edge_BKP = edge_BKP | (near_BKM[:, :, None, :] == propagated_BP[:, None, :, None]).any(dim=-1)
    row_BK1 = inv_sqrt_degree_BG.gather(1, kept_BK)[:, :, None]
    column_B1P = inv_sqrt_degree_BG.gather(1, propagated_BP)[:, None, :]
    return torch.where(edge_BKP, row_BK1 * column_B1P, 0.0)


def coordinates(grid: list[int], device: torch.device) -> Tensor:
    """Return the position of each patch on a grid of R sides, [G, R].

    A first side of -P counts P grids that are apart: no patch is nearer to one of another grid than to any of its own.
    """
    if grid[0] < 0:
        here_GR = coordinates([-grid[0], *grid[1:]], device)
        return torch.cat([here_GR[:, :1] * (1 + sum(grid[1:])), here_GR[:, 1:]], dim=-1)
    index = torch.arange(torch.Size(grid).numel(), device=device)
    sides = []
    for side in reversed(grid):
        sides.append(index % side)
        index = index.div(side, rounding_mode="floor")
    return torch.stack(sides[::-1], dim=-1)


def place_numbers(places_BGR: Tensor, grid: list[int]) -> Tensor:
    """Return the row-major number of each place on a grid: what `coordinates` is undone by, [B, G]."""
    number_BG = places_BGR[..., 0] // (1 + sum(grid[1:]) if grid[0] < 0 else 1)
    for side, size in enumerate(grid[1:], start=1):
        number_BG = number_BG * size + places_BGR[..., side]
    return number_BG


def taken_places(places_BGR: Tensor, index_Bn: Tensor) -> Tensor:
    """Return the places of some patches of each image: [1 or B, G, R], [B, …] -> [B, …, R]."""
    if places_BGR.shape[0] == 1:
        return places_BGR[0][index_Bn]
    sides = places_BGR.shape[-1]
    flat_BnR = places_BGR.gather(1, index_Bn.flatten(1)[..., None].expand(-1, -1, sides))
    return flat_BnR.reshape(*index_Bn.shape, sides)


def _count(grid: list[int], places_BGR: Tensor | None) -> int:
    """Return G, the number of patches."""
    return math.prod(map(abs, grid)) if places_BGR is None else places_BGR.shape[1]


def _adjacent(a_R: Tensor, b_R: Tensor) -> Tensor:
    """Return whether two positions touch, corners included, and differ. Broadcasts over all but the last dimension."""
    return (a_R - b_R).abs().amax(dim=-1) == 1


def _most_similar(x_BGC: Tensor, neighbors: int) -> Tensor:
    """Return the M tokens of largest cosine similarity to each one, except itself: [B, G, M]."""
    unit_BGC = F.normalize(x_BGC.float(), dim=-1)
    with without_autocast(x_BGC):
        similarity_BGG = torch.matmul(unit_BGC, unit_BGC.transpose(-2, -1))
    itself_GG = torch.eye(x_BGC.shape[1], dtype=torch.bool, device=x_BGC.device)
    return similarity_BGG.masked_fill(itself_GG, float("-inf")).topk(neighbors, dim=-1, sorted=False).indices
