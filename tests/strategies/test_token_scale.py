"""Token scales: the bound that the plan knows holds, and decides whether attention is told them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import gtp_fx
from gtp_fx.model.pipeline import Optimised
from gtp_fx.strategies.token_scale import SCALES_READ_FROM, log_scale_bound

from support.captured import optimised, provenance
from support.zoo import BY_NAME, images, in_tiers

SCHEDULE = [30, 40, 20]


def optimized(name: str, **strategy: Any) -> Optimised:
    return optimised(BY_NAME[name], schedule=SCHEDULE, strategy=gtp_fx.GTP(**strategy))


def tells(fast: Optimised) -> bool:
    """Whether any attention of the graph is told token scales."""
    return any(node.target is torch.ops.gtp_fx.key_bias.default for node in fast.graph_module.graph.nodes)


@torch.no_grad()
@pytest.mark.xdist_group("vit-gap")
@pytest.mark.parametrize("graph", ["mixed", "spatial", "semantic"])
@pytest.mark.parametrize("alpha", in_tiers([0.1, 0.5, 1.0], 0.1, 0.5))
def test_no_scale_is_above_the_bound(graph: str, alpha: float) -> None:
    """On ill-matched tokens too: noise in place of images. Sums of provenance are the scales."""
    fast = optimized("vit-gap", graph=graph, alpha=alpha, neighbors=3)
    x = 3 * torch.randn(8, *images(BY_NAME["vit-gap"]).shape[1:], generator=torch.Generator().manual_seed(0))
    (found,) = provenance(fast, x)
    most = float(found.matrix.sum(dim=2).max())
    grid = fast.sites[0].grid.shape
    bound = math.exp(log_scale_bound(grid, graph, 3, alpha, SCHEDULE))
    assert 1 < most <= bound + 1e-5
    assert most > 1 + 0.05 * (bound - 1), "a bound that is never near says nothing"


def test_fewer_tokens_give_less() -> None:
    bounds = [log_scale_bound([14, 14], "mixed", 8, 0.4, counts) for counts in ([1], [2], [8], [100], [100, 90])]
    assert bounds == sorted(bounds)
    assert bounds[0] == pytest.approx(math.log(1 + 0.4 / math.sqrt(8)))
    assert log_scale_bound([14, 14], "mixed", 8, 0.0, [100]) == 0 == log_scale_bound([1, 1], "spatial", 8, 0.4, [0])


@pytest.mark.xdist_group("deit")
@pytest.mark.parametrize(("alpha", "told"), [(0.1, False), (0.4, True)])
def test_scales_are_told_where_they_matter(alpha: float, told: bool) -> None:
    """The paper's alphas on either side: the report names the decision, and the graph is that of the choice by hand."""
    fast, by_hand = optimized("deit", alpha=alpha), optimized("deit", alpha=alpha, token_scale=told)
    assert tells(fast) is told is fast.strategy.token_scale
    assert fast.graph_module.code == by_hand.graph_module.code
    assert fast.report.flops_after == by_hand.report.flops_after
    bound = log_scale_bound(fast.sites[0].grid.shape, "mixed", 8, alpha, SCHEDULE)
    assert (bound > SCALES_READ_FROM) is told


@pytest.mark.xdist_group("deit")
def test_the_papers_method_always_tells() -> None:
    assert tells(optimized("deit", token_scale=True))
    assert gtp_fx.GTP.paper().token_scale is True
    assert not tells(optimized("deit", alpha=0.4, token_scale=False))


@torch.no_grad()
@pytest.mark.xdist_group("vit-gap")
def test_pooling_weighs_by_scales_that_attention_is_not_told() -> None:
    row = BY_NAME["vit-gap"]
    x = images(row)
    plain, weighted = (optimized("vit-gap", alpha=0.1, weighted_pooling=on) for on in (False, True))
    assert not tells(plain) and not tells(weighted)
    usual, other = plain.graph_module(x), weighted.graph_module(x)
    assert (usual - other).abs().max() / usual.abs().max() > 1e-5


@pytest.mark.xdist_group("deit")
def test_a_budget_is_met_whatever_is_decided() -> None:
    for alpha in (0.1, 0.4):
        fast = optimised(BY_NAME["deit"], flops_budget=0.7, strategy=gtp_fx.GTP(alpha=alpha))
        assert fast.report.flops_ratio <= 0.7


def test_what_may_be_asked() -> None:
    with pytest.raises(gtp_fx.OptionError, match=r"token_scale='always'.*True, False or 'auto'"):
        gtp_fx.GTP(token_scale="always")
