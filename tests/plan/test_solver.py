"""The solver finds the best schedule: brute force over every one agrees, on made-up costs and on real models."""

from __future__ import annotations

import itertools
import time
from functools import cache

import numpy as np
import pytest
from torch import fx

import gtp_fx
from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.capture.inputs import call_signature
from gtp_fx.capture.module import capture_module
from gtp_fx.model.pipeline import run_exact_passes
from gtp_fx.options.options import Options
from gtp_fx.plan import least_damage as solver
from gtp_fx.plan.cost.chains import Chain, CostModel, remaining_tokens
from gtp_fx.plan.cost.closed_form import flops_model
from gtp_fx.plan.damage.prior import prior_damage
from gtp_fx.plan.damage.tables import Damage
from gtp_fx.plan.find_sites import find_sites
from gtp_fx.plan.least_damage import _WORTH, least_damage, least_damage_few_sites
from gtp_fx.plan.shortest_path import OverBudget, Steps, solve
from gtp_fx.plan.site import Site
from gtp_fx.types.axes import TokenAxis, TokenDomain
from gtp_fx.types.grids import Grid

from support.every_schedule import coarse, damage_of, every_schedule
from support.window_families import SWIN
from support.zoo import BY_NAME, build, images, in_groups, in_tiers


def chain(random: np.random.Generator, sites: int, levels: list[int]) -> Steps:
    """Costs that fall and damages that rise with the tokens gone, otherwise at random: neither is convex."""
    size = len(levels)
    behind = random.uniform(1, 2, (sites, 1)) * np.array(levels)
    at = random.uniform(0, 5, (sites, size, size))
    at[:, np.arange(size), np.arange(size)] = 0
    lost = np.cumsum(random.exponential(1, (sites, size)), axis=1)
    damage = np.maximum(lost[:, None, :] - lost[:, :, None], 0)
    return Steps(np.array(levels), at + behind[:, None, :], damage)


def brute_force(chains: list[Steps], budget: float) -> float:
    best = np.inf
    paths = [list(itertools.combinations_with_replacement(range(len(c.levels)), len(c.cost))) for c in chains]
    for chosen in itertools.product(*paths):
        cost = damage = 0.0
        for steps, path in zip(chains, chosen, strict=True):
            for site, (before, after) in enumerate(itertools.pairwise((0, *path))):
                cost += steps.cost[site, before, after]
                damage += steps.damage[site, before, after]
        if cost <= budget:
            best = min(best, damage)
    return float(best)


@pytest.mark.parametrize("seed", [pytest.param(n, marks=pytest.mark.nightly if n >= 8 else ()) for n in range(40)])
def test_brute_force_agrees(seed: int) -> None:
    random = np.random.default_rng(seed)
    chains = [chain(random, int(random.integers(1, 5)), [40, 30, 22, 15, 8, 1]) for _ in range(random.integers(1, 3))]
    whole = sum(float(c.cost[:, 0, 0].sum()) for c in chains)
    budget = whole * random.uniform(0.4, 0.95)
    least = brute_force(chains, budget)
    if np.isinf(least):
        with pytest.raises(OverBudget):
            solve(chains, budget, tolerance=0)
        return
    found = solve(chains, budget, tolerance=0)
    assert found.damage == pytest.approx(least, rel=1e-9)
    assert found.cost <= budget
    assert found.bound <= least + 1e-9, "what it claims can't be beaten"


def test_nothing_leaves_where_the_budget_allows_everything() -> None:
    steps = chain(np.random.default_rng(0), 3, [10, 5, 1])
    assert solve([steps], float(steps.cost[:, 0, 0].sum())).remaining == ((10, 10, 10),)


@cache
def priced(name: str) -> CostModel:
    """The FLOPs model of a real model, as planning makes it."""
    if name == "swin":
        model, example = SWIN.model(), SWIN.inputs()
    else:
        model, example = build(BY_NAME[name], depth=4), images(BY_NAME[name])
    options = Options.of(flops_budget=0.7)
    captured = capture_module(model, call_signature(model, example), training=False)
    exact = run_exact_passes(captured, options)
    gm: fx.GraphModule = exact.graph_module
    found = find_sites(typed_graph(gm.graph), options.strategy)
    return flops_model(found.typing, found.sites, options.strategy, exact.original.flops)


priced_models = pytest.mark.parametrize(
    "name",
    [
        in_groups(name, f"{name} of four blocks", nightly=name != "vit-gap")
        for name in ("vit", "vit-gap", "reg4-map", "swin")
    ],
)


@priced_models
@pytest.mark.parametrize("budget", in_tiers([0.9, 0.75, 0.6], 0.9, 0.6))
def test_brute_force_agrees_on_real_models(name: str, budget: float) -> None:
    """Streams that shrink from block to block, and branches that are chains of their own."""
    model = priced(name)
    damage = prior_damage(model.sites)
    limit = budget * model.original
    within = [counts for counts in every_schedule(model) if model.cost(counts) <= limit]
    if not within:
        with pytest.raises(OverBudget):
            least_damage(model, damage, limit, coarse)
        return
    best = min(damage_of(model, damage, counts) for counts in within)
    found = least_damage(model, damage, limit, coarse)
    assert model.cost(found) <= limit
    assert damage_of(model, damage, found) == pytest.approx(best, rel=1.1e-3), "to its tolerance"


@priced_models
@pytest.mark.parametrize("budget", in_tiers([0.9, 0.75], 0.9))
def test_few_sites_for_little_more_damage(name: str, budget: float) -> None:
    """Each site left out saves `_WORTH` of the least damage, so what it costs is no more than that."""
    model = priced(name)
    damage = prior_damage(model.sites)
    limit = budget * model.original
    if min(model.cost(counts) for counts in every_schedule(model)) > limit:
        with pytest.raises(OverBudget):
            least_damage_few_sites(model, damage, limit)
        return
    many, few = least_damage(model, damage, limit), least_damage_few_sites(model, damage, limit)
    assert model.cost(few) <= limit
    spared = sum(map(bool, many)) - sum(map(bool, few))
    assert spared >= 0
    assert damage_of(model, damage, few) <= damage_of(model, damage, many) * (1 + _WORTH * spared) * 1.03
    assert damage.per_site == 0, "a price is no part of the damage"


def test_few_sites_of_twelve_blocks() -> None:
    """With so many blocks some are not worth a site, and the damage that a chain reports is the sum of its steps."""
    chain_model = made_up_chain(blocks=12, whole=64)
    damage = Damage(tuple(np.arange(64.0) ** 2 for _ in range(12)), "a test")
    many, few = least_damage(chain_model, damage, 500.0), least_damage_few_sites(chain_model, damage, 500.0)
    assert sum(map(bool, few)) < sum(map(bool, many))
    left = remaining_tokens(chain_model.chains[0], few)
    assert damage.of(chain_model.chains[0], left) == pytest.approx(damage_of(chain_model, damage, few))


def test_the_more_is_removed_the_less_a_site_has_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """A site costs the same at any budget, and is worth more where more has to be removed."""
    model = made_up_chain(blocks=12, whole=64)
    damage = Damage(tuple(np.arange(64.0) ** 2 for _ in range(12)), "a test")
    whole = float(model.cost((0,) * 12))
    charged: list[float] = []
    monkeypatch.setattr(solver, "least_damage", lambda _, priced, __: charged.append(priced.per_site))
    for removed in (0.1, 0.26, 0.5, 0.6):
        solver.least_damage_few_sites(model, damage, (1 - removed) * whole)
        least = solver.least_within(model, damage, (1 - removed) * whole, solver.coarse_levels(model), 0.02)
        charged[-1] /= damage_of(model, damage, least)
    assert charged == pytest.approx([_WORTH, _WORTH, 0.0468, 0.039], rel=0.02)


def made_up_chain(blocks: int, whole: int) -> CostModel:
    """A token costs 1 in each block behind."""
    behind = np.tile(np.arange(whole + 1.0), (blocks, 1))
    chain = Chain(tuple(range(blocks)), whole, behind, (lambda before, after: 0.0,) * blocks)
    axis = TokenAxis(TokenDomain(Grid("patches", (8, whole // 8))))
    sites = tuple(Site(block, axis, 8, 1) for block in range(blocks))
    return CostModel(sites, (chain,), 0.0, (), float(blocks * whole))


@pytest.mark.nightly
def test_the_same_schedule_each_time() -> None:
    model = build(BY_NAME["vit"], depth=4)
    first, second = (gtp_fx.optimize(model, flops_budget=0.7, compile=False).schedule for _ in range(2))
    assert first == second


def test_large_models_are_solved_in_half_a_second() -> None:
    """ViT-L's 24 blocks; the shared machine may be slow, so three times that are let pass."""
    whole, sites = 576, 24
    levels = np.arange(whole, 0, -3)
    count = levels.astype(float)
    behind = 2.5e6 * count + 1e3 * count**2
    at = np.abs(count[:, None] - count[None, :]) * 1e5
    share = np.clip(1 - count[None, :] / count[:, None], 0, None)
    depth = np.arange(sites)[:, None, None] / sites
    steps = Steps(levels, np.broadcast_to(at + behind, (sites, *at.shape)), (1 - 0.8 * depth) * share**2)
    start = time.perf_counter()
    found = solve([steps], 0.7 * sites * float(behind[0]))
    assert time.perf_counter() - start < 1.5
    assert found.damage <= found.bound * 1.002
