"""ToMe, token merging (arXiv 2210.09461): every second token may merge into the one that is most similar to it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from gtp_fx.strategies.grouping import Grouping
from gtp_fx.strategies.matching import bipartite_matching, matching_flops
from gtp_fx.strategies.registry import register_strategy
from gtp_fx.strategies.sites import SiteShape
from gtp_fx.strategies.tokens import Groups, Tokens, averaged


@register_strategy
@dataclass(frozen=True)
class ToMe(Grouping):
    """Bipartite soft matching on the heads' mean keys, size-weighted means and proportional attention (section 3).

    It follows the publication and its code, from the second site on, too: there tokens alternate between the sets in
    the order in which the site before put the sets one behind the other, which a number for each token remembers, since
    the stream stays in the grid's order. A site may remove more than half of the tokens, in several rounds of at most
    half.
    """

    name: ClassVar[str] = "tome"
    merges: ClassVar[bool] = True
    sized: ClassVar[bool] = True
    carries: ClassVar[bool] = True

    def group(self, tokens: Tokens) -> Groups:
        place_Bn = None if tokens.carried_Bn is None else tokens.carried_Bn.long()
        *matched, place_BK = bipartite_matching(
            tokens.keys_BnD, tokens.sizes_Bn, tokens.removed, tokens.prefix, place_Bn
        )
        groups = averaged(tokens, *matched)
        carried_Bn = torch.zeros_like(tokens.sizes_Bn).scatter(1, groups.kept_BK, place_BK.float())
        return replace(groups, carried_Bn=carried_Bn)

    def group_flops(self, site: SiteShape) -> Any:
        removed = site.patches_in - site.patches_out
        return site.images * matching_flops(site.patches_in, removed, site.key_features, site.prefix)
