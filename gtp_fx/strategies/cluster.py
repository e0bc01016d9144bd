"""AiluRus (arXiv 2311.01197): once, early, the tokens are clustered around peaks of their density, with an eye to where they are."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gtp_fx.errors import OptionError
from gtp_fx.ops.token_graph import coordinates
from gtp_fx.strategies.grouping import Grouping
from gtp_fx.strategies.protocol import SiteShape
from gtp_fx.strategies.registry import register_strategy
from gtp_fx.strategies.tokens import Groups, Tokens, averaged, split


@register_strategy
@dataclass(frozen=True)
class Cluster(Grouping):
    """Density peaks: a token is an anchor where many are near it, and denser ones are far. The others join the nearest anchor.

    With d_ij the distance of two tokens (of features, in units of its mean, plus `spatial` times that of places, in units of the grid's
    diagonal): density rho_i = exp(-mean of d_ij² over the `neighbors` nearest); delta_i = the least d_ij to a denser one, for
    the densest the largest of all; anchors are those of largest rho_i * delta_i. A cluster is its members' mean, at its anchor's place.
    Where the model returns every patch (a dense output), each gets back what became of its cluster.

    after: how many blocks run before on all tokens. token_scale: tell attention how many patches a cluster is, which the
    publication doesn't. The publication's clusters are made in this way; its weight of places isn't known to be this one.
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

    def positions(self, blocks: int) -> Collection[int]:
        return [min(self.after, blocks - 1)]

    def group(self, tokens: Tokens) -> Groups:
        apart_Bnn = self._distances(tokens)
        count = apart_Bnn.shape[1]
        # Itself is at distance 0 and no neighbour: left out as the nearest of all.
        nearest_Bnk = apart_Bnn.topk(min(self.neighbors + 1, count), dim=-1, largest=False).values[..., 1:]
        density_Bn = torch.exp(-nearest_Bnk.square().mean(dim=-1))
        # Of equally dense ones the earlier counts as denser, so that one alone has none above it.
        place_n = torch.arange(count, device=density_Bn.device)
        earlier_nn = place_n[None, :] < place_n[:, None]
        mine_Bn1, theirs_B1n = density_Bn[:, :, None], density_Bn[:, None, :]
        denser_Bnn = (theirs_B1n > mine_Bn1) | ((theirs_B1n == mine_Bn1) & earlier_nn)
        above_Bn = torch.where(denser_Bnn, apart_Bnn, float("inf")).amin(dim=-1)
        delta_Bn = torch.where(above_Bn.isinf(), apart_Bnn.amax(dim=-1), above_Bn)
        kept_BK, removed_BP = split(density_Bn * delta_Bn, tokens.leaving)
        to_anchors_BnK = apart_Bnn.gather(2, kept_BK[:, None, :].expand(-1, count, -1))
        nearest_Bn = to_anchors_BnK.argmin(dim=-1)
        return averaged(tokens, kept_BK, removed_BP, nearest_Bn.gather(1, removed_BP))

    def _distances(self, tokens: Tokens) -> Tensor:
        """[B, n, n] in float32."""
        x_BnC = tokens.patches_BnC.float()
        square_Bn = x_BnC.square().sum(dim=-1)
        inner_Bnn = torch.matmul(x_BnC, x_BnC.transpose(-2, -1))
        features_Bnn = (square_Bn[:, :, None] + square_Bn[:, None, :] - 2 * inner_Bnn).clamp(min=0).sqrt()
        itself_nn = torch.eye(x_BnC.shape[1], dtype=torch.bool, device=x_BnC.device)
        features_Bnn = features_Bnn.masked_fill(itself_nn, 0.0)  # rounding leaves a little
        mean_B11 = features_Bnn.mean(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        here_BnR = coordinates(list(tokens.grid), x_BnC.device)[tokens.index_Bn].float()
        diagonal = sum(side**2 for side in tokens.grid) ** 0.5
        places_Bnn = (here_BnR[:, :, None] - here_BnR[:, None, :]).square().sum(dim=-1).sqrt() / diagonal
        apart_Bnn: Tensor = features_Bnn / mean_B11 + self.spatial * places_Bnn
        return apart_Bnn

    def group_flops(self, site: SiteShape) -> Any:
        return 2 * site.images * site.patches_in * site.patches_in * site.channels
