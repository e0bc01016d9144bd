"""ToMe, token merging (arXiv 2210.09461): the tokens of every second place join the one they are most like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from gtp_fx.strategies.grouping import Grouping
from gtp_fx.strategies.matching import bipartite_matching, matching_flops
from gtp_fx.strategies.protocol import SiteShape
from gtp_fx.strategies.registry import register_strategy
from gtp_fx.strategies.tokens import Groups, Tokens, averaged


@register_strategy
@dataclass(frozen=True)
class ToMe(Grouping):
    """Bipartite soft matching on the mean of the heads' keys, means weighted by size, and proportional attention (section 3).

    As the publication has it, but for two things that a graph asks: tokens keep the order of the grid, so which ones take
    turns differs from the second site on; and a site may take more than half of the tokens, in rounds of halves.
    """

    name: ClassVar[str] = "tome"
    merges: ClassVar[bool] = True
    sized: ClassVar[bool] = True

    def group(self, tokens: Tokens) -> Groups:
        return averaged(tokens, *bipartite_matching(tokens.keys_BnD, tokens.sizes_Bn, tokens.leaving, tokens.prefix))

    def group_flops(self, site: SiteShape) -> Any:
        leaving = site.patches_in - site.patches_out
        return site.images * matching_flops(site.patches_in, leaving, site.key_features, site.prefix)
