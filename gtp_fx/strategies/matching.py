"""Bipartite soft matching (ToMe, arXiv 2210.09461, section 3): assign removed tokens to kept ones in one step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gtp_fx.strategies.tokens import joins, ranks_among, split


def bipartite_matching(metric_BnD: Tensor, size_Bn: Tensor, removed: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """Match the `removed` tokens of set A that are most similar to one of set B, and remove them.

    Tokens are in set A and set B alternately, counting the prefix tokens; the first of those is in A. Each patch in A
    has an edge to the patch in B that is most similar to it by cosine, and the `removed` strongest edges are followed.
    Prefix tokens are never matched. A holds half of the tokens, so removing more takes several rounds; later rounds
    match means.

    metric_BnD: what similarity is measured on.
    size_Bn: how many original patches each token stands for.

    Returns kept_BK, removed_BP (the removed ones), and into_BP: which of the K kept tokens each removed one joins.
    """
    count = metric_BnD.shape[1]
    most = set_a_size(count, prefix)
    kept_BK, removed_BP, into_BP = _round(metric_BnD, min(removed, most), prefix)
    if removed <= most:
        return kept_BK, removed_BP, into_BP
    mean_BKD, size_BK = _means(metric_BnD, size_Bn, kept_BK, removed_BP, into_BP)
    later_kept, later_removed, later_into = bipartite_matching(mean_BKD, size_BK, removed - most, prefix)
    # Where the tokens kept by the first round are now: each is still kept, or has joined another.
    places_BK = torch.arange(later_kept.shape[1], device=kept_BK.device).expand_as(later_kept)
    now_BK = torch.zeros_like(kept_BK).scatter(1, later_kept, places_BK).scatter(1, later_removed, later_into)
    removed_BP = torch.cat([removed_BP, kept_BK.gather(1, later_removed)], dim=1)
    into_BP = torch.cat([now_BK.gather(1, into_BP), later_into], dim=1)
    # Removed tokens of both rounds in one ascending list, as `Groups` needs it.
    ascending = removed_BP.argsort(dim=1)
    return kept_BK.gather(1, later_kept), removed_BP.gather(1, ascending), into_BP.gather(1, ascending)


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


def _round(metric_BnD: Tensor, removed: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """Match once, removing at most all of A. Results as in `bipartite_matching`."""
    first, count = prefix % 2, metric_BnD.shape[1]
    unit_BnD = F.normalize(metric_BnD.float(), dim=-1)
    a_BaD, b_BbD = unit_BnD[:, first::2], unit_BnD[:, 1 - first :: 2]
    similarity_Ba, partner_Ba = torch.matmul(a_BaD, b_BbD.transpose(-2, -1)).max(dim=-1)
    # Interleave both sets again: the most similar of A get the lowest scores, and B is never removed.
    never_Bb = torch.full_like(b_BbD[..., 0], float("inf"))
    scores = [-similarity_Ba, never_Bb] if first == 0 else [never_Bb, -similarity_Ba]
    kept_BK, removed_BP = split(_interleaved(*scores)[:, :count], removed)
    partner_BP = partner_Ba.gather(1, (removed_BP - first) // 2)
    return kept_BK, removed_BP, ranks_among(kept_BK, 2 * partner_BP + 1 - first)


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
