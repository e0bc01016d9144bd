"""Bipartite soft matching (ToMe, arXiv 2210.09461, section 3): who joins whom, without an iteration."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gtp_fx.strategies.tokens import joins, ranks_among, split


def bipartite_matching(metric_BnD: Tensor, size_Bn: Tensor, leaving: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """kept_BK, removed_BP, and into_BP: which of the K each that leaves joins.

    Tokens are set A and set B by turns, counted with the prefix tokens, of which the first is in A; each patch in A has an
    edge to the one in B that is most like it by cosine, and the `leaving` strongest edges are followed. A prefix token is on
    neither side. Since A is half of all, more than that leave in several rounds, of which later ones match means.
    """
    count = metric_BnD.shape[1]
    most = set_a_size(count, prefix)
    kept_BK, removed_BP, into_BP = _round(metric_BnD, min(leaving, most), prefix)
    if leaving <= most:
        return kept_BK, removed_BP, into_BP
    mean_BKD, size_BK = _means(metric_BnD, size_Bn, kept_BK, removed_BP, into_BP)
    later_kept, later_left, later_into = bipartite_matching(mean_BKD, size_BK, leaving - most, prefix)
    # Where each that stayed in the first round is now: it stays, or has joined another.
    places_BK = torch.arange(later_kept.shape[1], device=kept_BK.device).expand_as(later_kept)
    now_BK = torch.zeros_like(kept_BK).scatter(1, later_kept, places_BK).scatter(1, later_left, later_into)
    removed_BP = torch.cat([removed_BP, kept_BK.gather(1, later_left)], dim=1)
    into_BP = torch.cat([now_BK.gather(1, into_BP), later_into], dim=1)
    ascending = removed_BP.argsort(dim=1)
    return kept_BK.gather(1, later_kept), removed_BP.gather(1, ascending), into_BP.gather(1, ascending)


def matching_flops(patches: Any, leaving: Any, features: Any, prefix: int) -> Any:
    """Of an image: similarities of A and B in each round, and the means between rounds. Numbers or arrays of them."""
    count, left = np.asarray(patches), np.asarray(leaving)
    total: Any = 0
    while np.any(left > 0):
        in_a = set_a_size(count, prefix)
        total = total + np.where(left > 0, 2 * in_a * (count - in_a) * features, 0)
        more = left > in_a
        total = total + np.where(more, 2 * (count - in_a) * in_a * features, 0)
        count, left = np.where(more, count - in_a, count), np.where(more, left - in_a, 0)
    return total


def set_a_size(count: Any, prefix: int) -> Any:
    """Patches in A: every second one, from the first where an even number of tokens stands before them."""
    return (count + 1 - prefix % 2) // 2


def _round(metric_BnD: Tensor, leaving: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    first, count = prefix % 2, metric_BnD.shape[1]
    unit_BnD = F.normalize(metric_BnD.float(), dim=-1)
    a_BaD, b_BbD = unit_BnD[:, first::2], unit_BnD[:, 1 - first :: 2]
    likeness_Ba, partner_Ba = torch.matmul(a_BaD, b_BbD.transpose(-2, -1)).max(dim=-1)
    # Both sets by turns again: the most alike of A are the lowest scores, those of B never leave.
    never_Bb = torch.full_like(b_BbD[..., 0], float("inf"))
    turns = [-likeness_Ba, never_Bb] if first == 0 else [never_Bb, -likeness_Ba]
    kept_BK, removed_BP = split(_by_turns(*turns)[:, :count], leaving)
    partner_BP = partner_Ba.gather(1, (removed_BP - first) // 2)
    return kept_BK, removed_BP, ranks_among(kept_BK, 2 * partner_BP + 1 - first)


def _by_turns(x_Ba: Tensor, y_Bb: Tensor) -> Tensor:
    """x0, y0, x1, y1, …; one entry too many where there is a y less."""
    if x_Ba.shape[1] > y_Bb.shape[1]:
        y_Bb = torch.cat([y_Bb, y_Bb.new_zeros(y_Bb.shape[0], 1)], dim=1)
    return torch.stack([x_Ba, y_Bb], dim=2).flatten(1)


def _means(
    metric_BnD: Tensor, size_Bn: Tensor, kept_BK: Tensor, removed_BP: Tensor, into_BP: Tensor
) -> tuple[Tensor, Tensor]:
    weighed_BnD = metric_BnD.float() * size_Bn[..., None]
    joined_BKP = joins(into_BP, kept_BK.shape[1])
    rows_BKD, rows_BPD = (
        weighed_BnD.gather(1, index[..., None].expand(-1, -1, metric_BnD.shape[-1])) for index in (kept_BK, removed_BP)
    )
    size_BK = size_Bn.gather(1, kept_BK) + (joined_BKP * size_Bn.gather(1, removed_BP)[:, None, :]).sum(dim=2)
    return (rows_BKD + torch.matmul(joined_BKP, rows_BPD)) / size_BK[..., None], size_BK
