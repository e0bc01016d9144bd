"""On a GPU target: the fastest of the schedules with indistinguishable damage. Slower ones are reported, or refused."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn

import gtp_fx
from gtp_fx.model.planner import Planner
from gtp_fx.options.options import Options
from gtp_fx.plan.cost.chains import Chain, CostModel
from gtp_fx.plan.damage.tables import Damage
from gtp_fx.plan.fastest import fastest_alike
from gtp_fx.plan.least_damage import least_damage, least_damage_few_sites
from gtp_fx.plan.shortest_path import OverBudget
from gtp_fx.plan.site import Site
from gtp_fx.types.axes import TokenAxis, TokenDomain
from gtp_fx.types.grids import Grid

from support.every_schedule import damage_of, every_schedule
from support.printed import in_one_line
from support.zoo import BY_NAME, build, images

BLOCKS, WHOLE, TILE = 4, 64, 16


def made_up(behind: Sequence[float], of_site: float) -> CostModel:
    """behind: what a block costs by the tokens it has, [WHOLE + 1]. of_site: what a place where some leave does."""
    site_cost = lambda before, after: of_site * (np.asarray(after) < before)  # noqa: E731
    chain = Chain(tuple(range(BLOCKS)), WHOLE, np.tile(behind, (BLOCKS, 1)), (site_cost,) * BLOCKS)
    axis = TokenAxis(TokenDomain(Grid("patches", (8, WHOLE // 8))))
    sites = tuple(Site(block, axis, 8, 1) for block in range(BLOCKS))
    return CostModel(sites, (chain,), 0.0, (), float(BLOCKS * WHOLE))


FLOPS = made_up(np.arange(WHOLE + 1.0), 0.0)
SECONDS = made_up(np.ceil(np.arange(WHOLE + 1.0) / TILE) * TILE, 6.0)
"""Whole tiles of 16 tokens, and a site costs as much as six tokens in a block."""


def damage(uncertainty: float) -> Damage:
    gone = np.arange(float(WHOLE))
    tables = tuple(np.exp(-block / BLOCKS) * (gone / (WHOLE - gone)) ** 2 for block in range(BLOCKS))
    return Damage(tables, "a test", uncertainty=uncertainty)


@pytest.mark.parametrize("uncertainty", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("budget", [0.8, 0.6])
def test_no_schedule_that_is_as_good_is_faster(budget: float, uncertainty: float) -> None:
    """Brute force looks at every eighth count, so it may be beaten, and by a hundredth win: prices are bisected."""
    limit, lost = budget * FLOPS.original, damage(uncertainty)
    found = fastest_alike(FLOPS, SECONDS, lost, limit)
    least = damage_of(FLOPS, lost, least_damage(FLOPS, lost, limit))
    assert FLOPS.cost(found) <= limit
    assert damage_of(FLOPS, lost, found) <= (1 + uncertainty) * least * 1.03
    alike = [
        counts
        for counts in every_schedule(FLOPS)
        if FLOPS.cost(counts) <= limit and damage_of(FLOPS, lost, counts) <= (1 + uncertainty) * least
    ]
    if alike:
        assert SECONDS.cost(found) <= 1.05 * min(map(SECONDS.cost, alike))


def test_the_less_is_known_the_faster() -> None:
    taken = [SECONDS.cost(fastest_alike(FLOPS, SECONDS, damage(u), 0.7 * FLOPS.original)) for u in (0.0, 0.5, 2.0)]
    assert taken[0] > taken[1] >= taken[2]


def test_what_no_schedule_reaches_is_refused() -> None:
    with pytest.raises(OverBudget):
        fastest_alike(FLOPS, SECONDS, damage(1.0), 0.01 * FLOPS.original)


def small(depth: int) -> Planner:
    model = build(BY_NAME["vit"], depth=depth)
    return Planner(model, images(BY_NAME["vit"]))


@pytest.mark.nightly
def test_a_gpus_schedule_has_fewer_sites_than_a_cpus() -> None:
    """Where FLOPs are the budget on both."""
    planner = small(depth=6)
    plans = {
        (target, batch): planner.plan(Options.of(flops_budget=0.74, target=target, batch=batch))
        for target, batch in (("cpu", 1), ("cpu", 256), ("h100", 1))
    }
    assert all(plan.flops_ratio <= 0.74 for plan in plans.values())
    assert plans["cpu", 1].schedule == plans["cpu", 256].schedule
    sites = {key: sum(map(bool, plan.schedule)) for key, plan in plans.items()}
    assert sites["h100", 1] < sites["cpu", 1]


@pytest.mark.nightly
def test_what_is_predicted_slower_is_said_before_anything_is_compiled() -> None:
    """A small net alone on a GPU is all launches."""
    model = build(BY_NAME["vit"])
    fast = gtp_fx.optimize(model, flops_budget=0.74, target="h100", batch=1, compile=False)
    assert "predicted slower than the original on target 'h100' for a batch of 1" in in_one_line(str(fast.report))
    large = Planner(meta_deit(), torch.empty(2, 3, 224, 224, device="meta", dtype=torch.bfloat16))
    assert not large.plan(Options.of(flops_budget=0.74, target="h100", batch=256)).hint
    with pytest.raises(
        gtp_fx.BudgetError, match=r"latency_budget=0\.9 of the original's time on target 'h100', 1 images"
    ):
        gtp_fx.optimize(model, latency_budget=0.9, target="h100", batch=1, compile=False)


def meta_deit() -> nn.Module:
    """DeiT-S's sizes without its numbers."""
    import timm

    with torch.device("meta"):
        return timm.create_model("deit_small_patch16_224", depth=6).bfloat16().eval()


def test_few_sites_are_what_a_cpu_gets() -> None:
    limit, lost = 0.7 * FLOPS.original, damage(0.5)
    assert least_damage_few_sites(FLOPS, lost, limit) == least_damage_few_sites(FLOPS, damage(0.0), limit)
