"""EViT (arXiv 2202.07800): the tokens that CLS attends to are kept, and the rest become one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from gtp_fx.strategies.grouping import Grouping
from gtp_fx.strategies.protocol import Strategy
from gtp_fx.strategies.registry import register_strategy
from gtp_fx.strategies.tokens import Groups, Tokens, joins, split


@register_strategy
@dataclass(frozen=True)
class TopK(Grouping):
    """Attentive tokens are kept, and inattentive ones are fused into one, weighted by attention (sections 3.2 and 3.3).

    The fused token takes the place of its most attentive member, and is ranked like any other at the next site.

    score: CLS attention, averaged over heads, in the publication; "broadcast-mean", the attention that all tokens pay,
        where there is no CLS.
    normalised: the fused token's weights add up to 1; in the publication they are the attention itself.
    """

    name: ClassVar[str] = "topk"
    merges: ClassVar[bool] = True
    skips_branches: ClassVar[bool] = True
    score: str = "cls-mean"
    normalised: bool = False

    def group(self, tokens: Tokens) -> Groups:
        score_Bn = tokens.score_Bn
        assert score_Bn is not None
        kept_BK, removed_BP = split(score_Bn, tokens.removed)
        if self.score.startswith("broadcast"):
            score_Bn = score_Bn / tokens.x_BNC.shape[1]  # from column sums to the mean over queries
        score_BK, score_BP = score_Bn.gather(1, kept_BK), score_Bn.gather(1, removed_BP)
        # The lowest kept token carries the removed ones. Ties as in `split`: the last of the lowest is the next to go.
        carrier_B1 = score_BK.shape[1] - 1 - score_BK.flip(1).argmin(dim=1, keepdim=True)
        carries_BK = joins(carrier_B1, score_BK.shape[1])[..., 0] > 0
        share_BP, share_B1 = score_BP, score_BK.gather(1, carrier_B1)
        if self.normalised:
            total_B1 = share_B1 + share_BP.sum(dim=1, keepdim=True)
            share_BP, share_B1 = share_BP / total_B1, share_B1 / total_B1
        weights_BKP = torch.where(carries_BK[..., None], share_BP[:, None, :], 0.0)
        return Groups(kept_BK, removed_BP, weights_BKP, torch.where(carries_BK, share_B1, 1.0))

    def variants(self) -> list[Strategy]:
        return [*super().variants(), replace(self, normalised=not self.normalised)]
