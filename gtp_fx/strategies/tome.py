"""ToMe, token merging (arXiv 2210.09461): every second token may merge into the one that is most similar to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from gtp_fx.strategies.grouping import Grouping
from gtp_fx.strategies.matching import bipartite_matching, matching_flops
from gtp_fx.strategies.registry import register_strategy
from gtp_fx.strategies.sites import SiteShape
from gtp_fx.strategies.tokens import Groups, Tokens, averaged


@register_strategy
@dataclass(frozen=True)
class ToMe(Grouping):
    """Bipartite soft matching on the heads' mean keys, size-weighted means and proportional attention (section 3).

    It follows the publication except where a graph needs otherwise. Tokens keep the grid's order, so from the second
    site on other tokens are in set A. And a site may remove more than half of the tokens, in several rounds of at most
    half.
    """

    name: ClassVar[str] = "tome"
    merges: ClassVar[bool] = True
    sized: ClassVar[bool] = True

    def group(self, tokens: Tokens) -> Groups:
        return averaged(tokens, *bipartite_matching(tokens.keys_BnD, tokens.sizes_Bn, tokens.removed, tokens.prefix))

    def group_flops(self, site: SiteShape) -> Any:
        removed = site.patches_in - site.patches_out
        return site.images * matching_flops(site.patches_in, removed, site.key_features, site.prefix)
