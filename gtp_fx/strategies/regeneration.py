"""Tokens that get little attention, or that another one can stand for, merge into the most similar kept one.

GTP's premise (arXiv 2311.03035) is that a token may go where the others can regenerate it. The publication takes a
token's attention to itself for how difficult that is. Here it is measured between tokens, by their keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gtp_fx.errors import OptionError
from gtp_fx.strategies.grouping import Grouping
from gtp_fx.strategies.plain_numbers import is_number
from gtp_fx.strategies.registry import register_strategy
from gtp_fx.strategies.sites import SiteShape
from gtp_fx.strategies.tokens import Groups, Tokens, averaged, split

WINDOWS = ("skip", "rest")
"""What happens in windows; see `Regeneration.windows`."""


@register_strategy
@dataclass(frozen=True)
class Regeneration(Grouping):
    """Removal by what would be lost if another token stood in for this one, and merging into the most similar kept one.

        score_i  =  a_i · d_i^difficulty        d_i  =  1 - max cos(k_i, k_j)  over all j with a_j > a_i

    a_i is the attention that a token receives (`score`), and k_i its key, averaged over heads. d_i is its difficulty of
    regeneration: the distance to the nearest token that receives more. Only those count, since of two equal tokens one
    has to stay. The lowest scores are removed. Each removed token merges into the kept one of the most similar key,
    which becomes the mean of all its members, weighted by the patches that each one stands for.

    In windows and maps, where tokens can only skip a branch, attention alone ranks them, and one that skips gets
    `branch_mean` times the mean of what the kept tokens of its window get. What the best guess of a token's own result
    is from the others' lies between nothing and their mean, by how alike results are; one half is right on average.

    score: what attention says of a token; by default what it receives from all tokens, averaged over heads.
    token_scale: adds the log of a token's patch count to attention's logits.
    difficulty: exponent of d_i, 0 or more; at 0 attention alone decides.
    branch_mean: share of the mean that tokens get which skip a branch, in [0, 1]; at 0 they stay what they were.
    windows: what happens in windows. With "skip" some tokens of each one skip a branch. With "rest" whole windows rest,
        where every node of a block keeps windows apart: the block runs for those whose tokens differ most, and for the
        mean tokens of a few cells of the others (2 x 2 of a window of 7 x 7). A schedule counts windows there. In other
        blocks tokens skip, by the same measure: those nearest to their window's mean, so that no attention map is made.
    rest_share: what a token of a window that rests gets of its cell's change, in [0, 1]; at 0 the cells aren't run.
    """

    name: ClassVar[str] = "regeneration"
    merges: ClassVar[bool] = True
    sized: ClassVar[bool] = True
    skips_branches: ClassVar[bool] = True
    recovers_branches: ClassVar[bool] = False
    recovers_updates: ClassVar[bool] = True
    score: str = "broadcast-mean"
    difficulty: float = 1.0
    branch_mean: float = 0.5
    windows: str = "rest"
    rest_share: float = 0.85

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.difficulty) or not 0 <= self.difficulty < float("inf"):
            raise OptionError(f"Regeneration(difficulty={self.difficulty!r}): give a finite number of 0 or more")
        if not is_number(self.branch_mean) or not 0 <= self.branch_mean <= 1:
            raise OptionError(f"Regeneration(branch_mean={self.branch_mean!r}): give a number from 0 to 1")
        if not is_number(self.rest_share) or not 0 <= self.rest_share <= 1:
            raise OptionError(f"Regeneration(rest_share={self.rest_share!r}): give a number from 0 to 1")
        if self.windows not in WINDOWS:
            raise OptionError(f"Regeneration(windows={self.windows!r}): give one of {', '.join(map(repr, WINDOWS))}")

    @property
    def rests_windows(self) -> bool:
        return self.windows == "rest"

    def group(self, tokens: Tokens) -> Groups:
        attention_Bn = tokens.score_Bn
        assert attention_Bn is not None
        # Ordered by attention, those that receive more than a token are the ones before it, in every image; of equal
        # ones the earlier is above, as in `split`. So one constant matrix masks all images.
        order_Bn = attention_Bn.argsort(dim=1, descending=True, stable=True)
        unit_BnD = F.normalize(_rows(tokens.keys_BnD, order_Bn), dim=-1)
        cosine_Bnn = torch.matmul(unit_BnD, unit_BnD.transpose(-2, -1))
        nearest_Bn = (cosine_Bnn + _not_before(cosine_Bnn)).amax(dim=-1).clamp(min=-1.0)
        # Rounding takes the cosine of equal keys past 1.
        difficulty_Bn = (1.0 - nearest_Bn).clamp(min=0.0) ** self.difficulty
        place_Bn = order_Bn.argsort(dim=1)
        kept_BK, removed_BP = split(attention_Bn * difficulty_Bn.gather(1, place_Bn), tokens.removed)
        to_all_BPn = _rows(cosine_Bnn, place_Bn.gather(1, removed_BP))
        to_kept_BPK = to_all_BPn.gather(2, place_Bn.gather(1, kept_BK)[:, None, :].expand(-1, tokens.removed, -1))
        return averaged(tokens, kept_BK, removed_BP, to_kept_BPK.argmax(dim=-1))

    def group_flops(self, site: SiteShape) -> Any:
        return 2 * site.images * site.patches_in * site.patches_in * site.key_features

    def variants(self) -> list[Regeneration]:
        changes: list[dict[str, Any]] = [{"difficulty": value} for value in (0.5, 1.0, 2.0)]
        changes += [{"token_scale": scales} for scales in (True, False)]
        changes += [{"score": score} for score in ("broadcast-mean", "broadcast-max", "cls-mean")]
        changes += [{"windows": what} for what in WINDOWS]
        varied = [replace(self, **change) for change in changes]
        return [variant for variant in dict.fromkeys(varied) if variant != self]


def _rows(x_BnD: Tensor, index_Bm: Tensor) -> Tensor:
    """Return [B, m, D]: some rows of each image. Whole rows are copied, which `gather` doesn't do."""
    images, count, features = x_BnD.shape
    first_B1 = torch.arange(images, device=index_Bm.device)[:, None] * count
    return x_BnD.reshape(-1, features).index_select(0, (index_Bm + first_B1).flatten()).view(images, -1, features)


def _not_before(cosine_Bnn: Tensor) -> Tensor:
    """Return [n, n]: what takes a cosine below -1 where the column isn't before the row, and 0 elsewhere."""
    count = cosine_Bnn.shape[-1]
    return cosine_Bnn.new_full((count, count), -4.0).triu()
