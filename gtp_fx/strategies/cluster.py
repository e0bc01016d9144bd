"""AiluRus (arXiv 2311.01197): cluster the tokens once, early, by features and position, around density peaks."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gtp_fx.errors import OptionError
from gtp_fx.ops.token_graph import coordinates
from gtp_fx.strategies.grouping import Grouping
from gtp_fx.strategies.registry import register_strategy
from gtp_fx.strategies.sites import SiteShape
from gtp_fx.strategies.tokens import Groups, Tokens, averaged, split
from gtp_fx.types.axes import TokenAxis
from gtp_fx.types.places import home_of


@register_strategy
@dataclass(frozen=True)
class Cluster(Grouping):
    """Density-peak clustering: the peaks are kept, and every other token joins the nearest one.

    A token is a peak (an anchor) if many tokens are near it and all denser ones are far away. The distance d_ij of two
    tokens is that of their features in units of its mean, plus `spatial` times that of their positions in units of the
    grid's diagonal. With it:

        rho_i    exp(-mean of d_ij² over the `neighbors` nearest tokens), the density
        delta_i  the smallest d_ij to a denser token; for the densest token, the largest d_ij
        anchors  the tokens of largest rho_i * delta_i

    A cluster becomes its members' mean, at its anchor's position. Where the model returns every patch (dense output),
    each patch gets back the result of its cluster. Clusters are made as in the publication, but the weight that it
    gives to positions isn't known to be the default of `spatial`.

    token_scale: adds the log of a cluster's patch count to attention's logits, which the publication doesn't do.
    after: number of blocks that run on all tokens first.
    neighbors: nearest tokens that the density is measured by.
    spatial: weight of positions against features.
    """

    name: ClassVar[str] = "cluster"
    merges: ClassVar[bool] = True
    sized: ClassVar[bool] = True
    token_scale: bool = False
    after: int = 2
    neighbors: int = 5
    spatial: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.after < 0 or self.neighbors < 1 or not 0 <= self.spatial < float("inf"):
            raise OptionError(f"{self}: after and spatial are 0 or more, neighbors 1 or more")

    def refuse(self, axis: TokenAxis, skipping: bool = False) -> str:
        grid = axis.domain.grid
        if self.spatial and (not grid.placed or home_of(grid) != grid):
            return (
                f"spatial={self.spatial:g} reads the tokens' places on a grid, and these have none (they come in as an "
                "argument, say) or aren't in its order: give spatial=0"
            )
        return super().refuse(axis, skipping)

    def positions(self, blocks: int) -> Collection[int]:
        return [min(self.after, blocks - 1)]

    def group(self, tokens: Tokens) -> Groups:
        distance_Bnn = self._distances(tokens)
        count = distance_Bnn.shape[1]
        # The nearest of all is the token itself, at distance 0: skip it.
        nearest_Bnk = distance_Bnn.topk(min(self.neighbors + 1, count), dim=-1, largest=False).values[..., 1:]
        density_Bn = torch.exp(-nearest_Bnk.square().mean(dim=-1))
        # Among equally dense tokens the earlier counts as denser, so that exactly one token has none above it.
        place_n = torch.arange(count, device=density_Bn.device)
        earlier_nn = place_n[None, :] < place_n[:, None]
        mine_Bn1, theirs_B1n = density_Bn[:, :, None], density_Bn[:, None, :]
        denser_Bnn = (theirs_B1n > mine_Bn1) | ((theirs_B1n == mine_Bn1) & earlier_nn)
        above_Bn = torch.where(denser_Bnn, distance_Bnn, float("inf")).amin(dim=-1)
        delta_Bn = torch.where(above_Bn.isinf(), distance_Bnn.amax(dim=-1), above_Bn)
        kept_BK, removed_BP = split(density_Bn * delta_Bn, tokens.removed)
        to_anchors_BnK = distance_Bnn.gather(2, kept_BK[:, None, :].expand(-1, count, -1))
        nearest_Bn = to_anchors_BnK.argmin(dim=-1)
        return averaged(tokens, kept_BK, removed_BP, nearest_Bn.gather(1, removed_BP))

    def _distances(self, tokens: Tokens) -> Tensor:
        """Return the distances of all pairs of patches, [B, n, n] float32."""
        x_BnC = tokens.patches_BnC.float()
        square_Bn = x_BnC.square().sum(dim=-1)
        inner_Bnn = torch.matmul(x_BnC, x_BnC.transpose(-2, -1))
        features_Bnn = (square_Bn[:, :, None] + square_Bn[:, None, :] - 2 * inner_Bnn).clamp(min=0).sqrt()
        itself_nn = torch.eye(x_BnC.shape[1], dtype=torch.bool, device=x_BnC.device)
        features_Bnn = features_Bnn.masked_fill(itself_nn, 0.0)  # rounding makes them slightly more than 0
        mean_B11 = features_Bnn.mean(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        here_BnR = coordinates(list(tokens.grid), x_BnC.device)[tokens.index_Bn].float()
        diagonal = sum(side**2 for side in tokens.grid) ** 0.5
        places_Bnn = (here_BnR[:, :, None] - here_BnR[:, None, :]).square().sum(dim=-1).sqrt() / diagonal
        distance_Bnn: Tensor = features_Bnn / mean_B11 + self.spatial * places_Bnn
        return distance_Bnn

    def group_flops(self, site: SiteShape) -> Any:
        return 2 * site.images * site.patches_in * site.patches_in * site.channels
