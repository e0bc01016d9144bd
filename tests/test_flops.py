"""FLOPs: counted as torch counts them, priced before the graph exists, kept under the budget, and the paper's figures."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

import gtp_fx
from gtp_fx.plan.cost.count import count_flops

from zoo import BY_NAME, DEPTH, WITH_DEAD_TOKENS, ZOO, Row, build, images


def meta_flops(model: nn.Module, *inputs: torch.Tensor) -> int:
    """What torch.utils.flop_counter counts on the meta device, per image."""
    batch = inputs[0].shape[0]
    with FlopCounterMode(display=False) as counter:
        model(*(x.to("meta") for x in inputs))
    total: int = counter.get_total_flops()
    assert total % batch == 0
    return total // batch


def on_meta(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph over parameters that hold no memory."""
    return gm.to("meta")


@pytest.mark.parametrize("row", ZOO, ids=lambda row: row.name)
def test_counted_flops_are_torchs(row: Row) -> None:
    model = build(row)
    fast = gtp_fx.optimize(model, flops_budget=0.6, compile=False)
    before, after = fast.report.flops_before, fast.report.flops_after
    x = images(row)
    assert after == meta_flops(on_meta(fast.graph_module), x)
    assert before == meta_flops(model.to("meta"), x)
    assert count_flops(fast.graph_module.graph) == after
    assert 0.59 < fast.report.flops_ratio <= 0.6, "strict, and within one percent"


@pytest.mark.parametrize("strategy", [{"graph": "spatial"}, {"score": "cls-max"}, {"attention_sparsity": 0.5}])
def test_every_option_is_priced(strategy: dict[str, Any]) -> None:
    """`optimize` itself asserts that the closed form equals the count of the graph it built."""
    row = BY_NAME["vit"]
    fast = gtp_fx.optimize(build(row), flops_budget=0.65, strategy=gtp_fx.GTP(**strategy), compile=False)
    assert fast.report.flops_after == meta_flops(on_meta(fast.graph_module), images(row))
    assert 0.64 < fast.report.flops_ratio <= 0.65


@pytest.mark.parametrize("budget", [0.95, 0.7, 0.5, 0.35, 0.31])
def test_budgets_are_met_strictly_and_closely(budget: float) -> None:
    report = gtp_fx.optimize(build(BY_NAME["vit-gap"]), flops_budget=budget, compile=False).report
    assert budget - 0.01 < report.flops_ratio <= budget


def test_an_explicit_schedule_costs_what_it_says() -> None:
    fast = gtp_fx.optimize(build(BY_NAME["eva"]), schedule=[0, 40, 0], compile=False)
    assert [(s.block, s.tokens_in, s.propagated, s.tokens_out) for s in fast.report.sites] == [(1, 197, 40, 157)]
    assert len(fast.schedule) == DEPTH


@pytest.fixture(scope="module")
def deit_small() -> nn.Module:
    with torch.device("meta"):
        return timm.create_model("deit_small_patch16_224").eval()


def ratio(model: nn.Module, **options: Any) -> float:
    x = torch.empty(2, 3, 224, 224, device="meta")
    return gtp_fx.optimize(model, example_inputs=x, compile=False, **options).report.flops_ratio


def test_dead_tokens_save_what_the_method_says(deit_small: nn.Module) -> None:
    report = gtp_fx.optimize(deit_small, flops_budget=1.0, compile=False).report
    assert round(report.flops_before / 2e9, 2) == 4.60, "GMACs of DeiT-S"
    assert 1 - report.flops_ratio == pytest.approx(0.069, abs=5e-4)


def test_the_papers_counts(deit_small: nn.Module) -> None:
    """Uniform P = 8 does not meet 0.74 on its own; P = 7 does once dead tokens are gone.

    The paper's ratios leave GTP's own work out, which is half a percent: the cosine similarities above all. A spatial
    graph has none of those, and P = 7 stays within a strict 0.74 with everything counted; the mixed graph misses it by 3e-4.
    """
    for count, published in ((8, 0.743), (9, 0.712)):
        whole = ratio(deit_small, schedule=[count] * 12, disabled_passes=WITH_DEAD_TOKENS)
        own_work = whole - published
        assert 0 < own_work < 6e-3
    for graph, count in (("spatial", 7), ("mixed", 8)):
        strategy = gtp_fx.GTP(graph=graph)
        fast = gtp_fx.optimize(deit_small, flops_budget=0.74, schedule="uniform", strategy=strategy, compile=False)
        assert set(fast.schedule.propagated[:-1]) == {count}
        assert fast.report.flops_ratio <= 0.74
