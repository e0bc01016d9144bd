"""PPT, token pruning and pooling (arXiv 2310.01812): prune or pool an image's tokens, by the variance of its scores."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from gtp_fx.errors import OptionError
from gtp_fx.strategies.grouping import Grouping
from gtp_fx.strategies.matching import bipartite_matching, matching_flops
from gtp_fx.strategies.protocol import Strategy
from gtp_fx.strategies.registry import register_strategy
from gtp_fx.strategies.sites import SiteShape
from gtp_fx.strategies.tokens import Groups, Tokens, averaged, split


@register_strategy
@dataclass(frozen=True)
class PPT(Grouping):
    """Pruning where an image's scores differ widely, pooling where they don't (section 3).

    A patch's score is the attention that CLS pays it times the length of its value, as a share of the sum over all
    patches. Where the variance of an image's scores is `threshold` or more, the lowest are pruned. Otherwise the most
    similar are pooled, as in ToMe. Attention is averaged over heads before it is multiplied; a value's length is over
    all heads.

    score: "cls-mean" in the publication; "broadcast-mean" where there is no CLS.
    threshold: limit on the variance. 7e-5 suits about 196 patches, whose mean share is 1/196; with fewer patches,
        shares are larger.
    blocks: blocks of a stream, counted from 0, that may have a site; numbers beyond its last block are ignored. None
        means those at a quarter, a half and three quarters of its depth (3, 6 and 9 of 12).
    """

    name: ClassVar[str] = "ppt"
    merges: ClassVar[bool] = True
    sized: ClassVar[bool] = True
    score: str = "cls-mean"
    threshold: float = 7e-5
    blocks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.threshold >= 0:
            raise OptionError(f"PPT(threshold={self.threshold!r}): give a variance of 0 or more; inf always pools")

    def positions(self, blocks: int) -> Collection[int]:
        if self.blocks is None:
            return sorted({min(round(blocks * part / 4), blocks - 1) for part in (1, 2, 3)})
        return [block for block in self.blocks if block < blocks]

    def group(self, tokens: Tokens) -> Groups:
        score_Bn = tokens.score_Bn
        assert score_Bn is not None
        shares_Bn = score_Bn * tokens.values_BHnD.float().square().sum(dim=(1, 3)).sqrt()
        shares_Bn = shares_Bn / shares_Bn.sum(dim=1, keepdim=True)
        prunes_B1 = shares_Bn.var(dim=1, keepdim=True) >= self.threshold
        kept_BK, removed_BP = split(shares_Bn, tokens.removed)
        matched = bipartite_matching(tokens.keys_BnD, tokens.sizes_Bn, tokens.removed, tokens.prefix)
        pooled = averaged(tokens, *matched[:3])
        assert pooled.weights_BKP is not None and pooled.own_BK is not None and pooled.size_BK is not None

        def either(pruned: Any, pooled: Tensor) -> Tensor:
            return torch.where(prunes_B1.reshape(-1, *(1,) * (pooled.ndim - 1)), pruned, pooled)

        return Groups(
            either(kept_BK, pooled.kept_BK),
            either(removed_BP, pooled.removed_BP),
            either(0.0, pooled.weights_BKP),
            either(1.0, pooled.own_BK),
            either(tokens.sizes_Bn.gather(1, kept_BK), pooled.size_BK),
        )

    def group_flops(self, site: SiteShape) -> Any:
        removed = site.patches_in - site.patches_out
        return site.images * matching_flops(site.patches_in, removed, site.key_features, site.prefix)

    def variants(self) -> list[Strategy]:
        thresholds = (0.0, 1e-5, 7e-5, 5e-4, 4e-3, float("inf"))
        others = [replace(self, threshold=value) for value in thresholds if value != self.threshold]
        return [*super().variants(), *others]
