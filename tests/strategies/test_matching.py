"""Bipartite matching, against the reference by hand: whom each token joins, and the list that the next site goes by."""

from __future__ import annotations

import pytest
import torch

from gtp_fx.strategies.matching import bipartite_matching

from support.reference_strategies import Seen, matched


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("schedule", [(8, 8, 8), (25, 5, 3), (9, 20, 5)])  # of 40: within a set, and beyond it
def test_each_site_matches_by_the_list_that_the_one_before_left(prefix: int, schedule: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    metric_nD, sizes = torch.randn(40, 6), torch.randint(1, 4, (40,)).float()
    place_Bn, listed = None, None
    for count in schedule:
        nothing = torch.zeros(0)
        by_hand = Seen(nothing, nothing, metric_nD[None].double(), nothing, sizes.tolist(), [], prefix, count, None)
        members, listed = matched(by_hand, listed)
        kept, gone, into, place_BK = bipartite_matching(metric_nD[None], sizes[None], count, prefix, place_Bn)
        found: dict[int, list[int]] = {keeper: [] for keeper in kept[0].tolist()}
        for i, keeper in zip(gone[0].tolist(), into[0].tolist(), strict=True):
            found[int(kept[0, keeper])].append(i)
        assert found == {keeper: sorted(joined) for keeper, joined in members.items()}
        # The next site's tokens are those that stay, renumbered, with features of their own.
        rank = {keeper: i for i, keeper in enumerate(kept[0].tolist())}
        listed = [rank[keeper] for keeper in listed]
        assert place_BK[0].argsort().tolist() == listed
        metric_nD, sizes, place_Bn = torch.randn(len(rank), 6), torch.ones(len(rank)), place_BK


@pytest.mark.parametrize("prefix", [0, 1])
def test_equal_tokens_have_places_of_their_own(prefix: int) -> None:
    """As those of a blank picture: all similarities are equal."""
    place_BK = bipartite_matching(torch.ones(2, 12, 4), torch.ones(2, 12), 4, prefix)[3]
    assert place_BK.sort(dim=1).values.tolist() == [list(range(8))] * 2
