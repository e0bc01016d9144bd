"""Bipartite soft matching (ToMe, arXiv 2210.09461, section 3): assign removed tokens to kept ones in one step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gtp_fx.strategies.tokens import joins, ranks_among, split


def bipartite_matching(
    metric_BnD: Tensor, size_Bn: Tensor, removed: int, prefix: int, place_Bn: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Match the `removed` tokens of set A that are most similar to one of set B, and remove them.

    Tokens of a list are in set A and set B alternately, counting the prefix tokens; the first of those is in A. Each
    patch in A has an edge to the patch in B that is most similar to it by cosine, and the `removed` strongest edges are
    followed. Prefix tokens are never matched. A holds half of the tokens, so removing more takes several rounds; later
    rounds match means.

    metric_BnD: what similarity is measured on.
    size_Bn: how many original patches each token stands for.
    place_Bn: each token's place in the list; None where that is the order in which tokens lie.

    Returns kept_BK, removed_BP (the removed ones), into_BP: which of the K kept tokens each removed one joins, and
    place_BK: the kept ones' places in the list that the sets make one behind the other, which the next site goes by.
    """
    count = metric_BnD.shape[1]
    if place_Bn is None:
        place_Bn = torch.arange(count, device=metric_BnD.device).expand(metric_BnD.shape[:2])
    most = set_a_size(count, prefix)
    kept_BK, removed_BP, into_BP, place_BK = _round(metric_BnD, place_Bn, min(removed, most), prefix)
    if removed <= most:
        return kept_BK, removed_BP, into_BP, place_BK
    mean_BKD, size_BK = _means(metric_BnD, size_Bn, kept_BK, removed_BP, into_BP)
    later_kept, later_removed, later_into, later_place = bipartite_matching(
        mean_BKD, size_BK, removed - most, prefix, place_BK
    )
    # Where the tokens kept by the first round are now: each is still kept, or has joined another.
    rank_BK = torch.arange(later_kept.shape[1], device=kept_BK.device).expand_as(later_kept)
    now_BK = torch.zeros_like(kept_BK).scatter(1, later_kept, rank_BK).scatter(1, later_removed, later_into)
    removed_BP = torch.cat([removed_BP, kept_BK.gather(1, later_removed)], dim=1)
    into_BP = torch.cat([now_BK.gather(1, into_BP), later_into], dim=1)
    # Removed tokens of both rounds in one ascending list, as `Groups` needs it.
    ascending = removed_BP.argsort(dim=1)
    kept_BK = kept_BK.gather(1, later_kept)
    return kept_BK, removed_BP.gather(1, ascending), into_BP.gather(1, ascending), later_place


def matching_flops(patches: Any, removed: Any, features: Any, prefix: int) -> Any:
    """Return the FLOPs for one image: similarities of A and B in each round, and the means between rounds.

    Arguments may be numbers or arrays of them.
    """
    count, pending = np.asarray(patches), np.asarray(removed)
    total: Any = 0
    while np.any(pending > 0):
        in_a = set_a_size(count, prefix)
        total = total + np.where(pending > 0, 2 * in_a * (count - in_a) * features, 0)
        more = pending > in_a
        total = total + np.where(more, 2 * (count - in_a) * in_a * features, 0)
        count, pending = np.where(more, count - in_a, count), np.where(more, pending - in_a, 0)
    return total


def set_a_size(count: Any, prefix: int) -> Any:
    """Return the number of patches in A: every second one, starting with the first where the prefix is even."""
    return (count + 1 - prefix % 2) // 2


def _round(metric_BnD: Tensor, place_Bn: Tensor, removed: int, prefix: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Match once, removing at most all of A. Results as in `bipartite_matching`."""
    first, count = prefix % 2, metric_BnD.shape[1]
    tokens_Bn = torch.arange(count, device=place_Bn.device).expand_as(place_Bn)
    listed_Bn = torch.zeros_like(tokens_Bn).scatter(1, place_Bn, tokens_Bn)
    unit_BnD = F.normalize(metric_BnD.float(), dim=-1)
    unit_BnD = unit_BnD.gather(1, listed_Bn[..., None].expand_as(unit_BnD))
    a_BaD, b_BbD = unit_BnD[:, first::2], unit_BnD[:, 1 - first :: 2]
    similarity_Ba, partner_Ba = torch.matmul(a_BaD, b_BbD.transpose(-2, -1)).max(dim=-1)
    # Interleave both sets again: the most similar of A get the lowest scores, and B is never removed.
    never_Bb = torch.full_like(b_BbD[..., 0], float("inf"))
    scores = [-similarity_Ba, never_Bb] if first == 0 else [never_Bb, -similarity_Ba]
    score_Bn = _interleaved(*scores)[:, :count].gather(1, place_Bn)
    kept_BK, removed_BP = split(score_Bn, removed)
    partner_BP = partner_Ba.gather(1, (place_Bn.gather(1, removed_BP) - first) // 2)
    into_BP = ranks_among(kept_BK, listed_Bn.gather(1, 2 * partner_BP + 1 - first))
    # What is left of A comes before B, as the authors' code has it: in the list's order, which it takes care of for the
    # sake of a CLS token in front, and without one by similarity.
    was_BK = place_Bn.gather(1, kept_BK)
    in_a_BK = score_Bn.gather(1, kept_BK) if prefix == 0 else was_BK - count
    order_BK = torch.where(was_BK % 2 == first, in_a_BK, was_BK + 2)
    # Of equal similarities, as those of equal tokens, the first token's is first: each place is some token's.
    return kept_BK, removed_BP, into_BP, order_BK.argsort(dim=1, stable=True).argsort(dim=1)


def _interleaved(x_Ba: Tensor, y_Bb: Tensor) -> Tensor:
    """Return x0, y0, x1, y1, …; where y has one entry less, the result has one too many at its end."""
    if x_Ba.shape[1] > y_Bb.shape[1]:
        y_Bb = torch.cat([y_Bb, y_Bb.new_zeros(y_Bb.shape[0], 1)], dim=1)
    return torch.stack([x_Ba, y_Bb], dim=2).flatten(1)


def _means(
    metric_BnD: Tensor, size_Bn: Tensor, kept_BK: Tensor, removed_BP: Tensor, into_BP: Tensor
) -> tuple[Tensor, Tensor]:
    """Return each kept token's mean with those that joined it, weighted by size, and its new size."""
    weighed_BnD = metric_BnD.float() * size_Bn[..., None]
    joined_BKP = joins(into_BP, kept_BK.shape[1])
    rows_BKD, rows_BPD = (
        weighed_BnD.gather(1, index[..., None].expand(-1, -1, metric_BnD.shape[-1])) for index in (kept_BK, removed_BP)
    )
    size_BK = size_Bn.gather(1, kept_BK) + (joined_BKP * size_Bn.gather(1, removed_BP)[:, None, :]).sum(dim=2)
    return (rows_BKD + torch.matmul(joined_BKP, rows_BPD)) / size_BK[..., None], size_BK
