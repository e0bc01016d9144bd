"""Token mergence (arXiv 2306.04897): tokens that aren't crucial merge into the crucial one most similar to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from gtp_fx.strategies.grouping import Grouping
from gtp_fx.strategies.registry import register_strategy
from gtp_fx.strategies.sites import SiteShape
from gtp_fx.strategies.tokens import Groups, Tokens, averaged, split


@register_strategy
@dataclass(frozen=True)
class Mergence(Grouping):
    """Merging by score: patches of the highest scores are crucial, and each other one merges into the most similar one.

    Similarity is the cosine. A merged token is the mean of its members, each weighted by the patches it stands for.
    This is the publication's mergence alone, without its multi-scale features.

    score: CLS attention; "broadcast-mean" where there is no CLS.
    token_scale: adds the log of a token's patch count to attention's logits.
    """

    name: ClassVar[str] = "mergence"
    merges: ClassVar[bool] = True
    sized: ClassVar[bool] = True
    score: str = "cls-mean"
    token_scale: bool = False

    def group(self, tokens: Tokens) -> Groups:
        assert tokens.score_Bn is not None
        kept_BK, removed_BP = split(tokens.score_Bn, tokens.removed)
        unit_BnC = F.normalize(tokens.patches_BnC.float(), dim=-1)
        crucial_BKC, other_BPC = (
            unit_BnC.gather(1, index[..., None].expand(-1, -1, unit_BnC.shape[-1])) for index in (kept_BK, removed_BP)
        )
        into_BP = torch.matmul(other_BPC, crucial_BKC.transpose(-2, -1)).argmax(dim=-1)
        return averaged(tokens, kept_BK, removed_BP, into_BP)

    def group_flops(self, site: SiteShape) -> Any:
        return 2 * site.images * site.patches_out * (site.patches_in - site.patches_out) * site.channels
