"""FLOPs: counted as torch does, priced before the graph exists, kept under the budget, and equal to the paper's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import gtp_fx
from gtp_fx.plan.cost.count import count_flops

from support.captured import optimised, shared_model
from support.zoo import BY_NAME, DEPTH, WITH_DEAD_TOKENS, Row, images, in_tiers, rows


def meta_flops(model: nn.Module, *inputs: torch.Tensor) -> int:
    """What torch.utils.flop_counter counts on the meta device, per image."""
    batch = inputs[0].shape[0]
    with FlopCounterMode(display=False) as counter:
        model(*(x.to("meta") for x in inputs))
    total: int = counter.get_total_flops()
    assert total % batch == 0
    return total // batch


def on_meta(module: nn.Module) -> nn.Module:
    """A copy over parameters that hold no memory."""
    return copy.deepcopy(module).to("meta")


@rows(by_default=("dinov2-reg4", "siglip-map", "non-square"))
def test_counted_flops_are_torchs(row: Row) -> None:
    fast = optimised(row, flops_budget=0.6)
    before, after = fast.report.flops_before, fast.report.flops_after
    x = images(row)
    assert after == meta_flops(on_meta(fast.graph_module), x)
    assert before == meta_flops(on_meta(shared_model(row)), x)
    assert count_flops(fast.graph_module.graph) == after
    assert 0.59 < fast.report.flops_ratio <= 0.6, "strict, and within one percent"


@pytest.mark.xdist_group("vit")
@pytest.mark.parametrize("strategy", [{"graph": "spatial"}, {"score": "cls-max"}, {"attention_sparsity": 0.5}])
def test_every_option_is_priced(strategy: dict[str, Any]) -> None:
    """`optimize` itself asserts that the closed form equals the count of the graph it built."""
    row = BY_NAME["vit"]
    fast = optimised(row, flops_budget=0.65, strategy=gtp_fx.GTP(**strategy))
    assert fast.report.flops_after == meta_flops(on_meta(fast.graph_module), images(row))
    assert 0.64 < fast.report.flops_ratio <= 0.65


@pytest.mark.xdist_group("vit-gap")
@pytest.mark.parametrize("budget", in_tiers([0.95, 0.7, 0.5, 0.35, 0.31], 0.95, 0.5, 0.35))
def test_budgets_are_met_strictly_and_closely(budget: float) -> None:
    report = optimised(BY_NAME["vit-gap"], flops_budget=budget).report
    assert budget - 0.01 < report.flops_ratio <= budget


@pytest.mark.xdist_group("eva")
def test_an_explicit_schedule_costs_what_it_says() -> None:
    fast = optimised(BY_NAME["eva"], schedule=[0, 40, 0])
    assert [(s.block, s.tokens_in, s.removed, s.tokens_out) for s in fast.report.sites] == [(1, 197, 40, 157)]
    assert len(fast.schedule) == DEPTH


class DeitSmall:
    """The paper's model, all of its blocks, without numbers."""

    def model(self) -> nn.Module:
        with torch.device("meta"):
            return timm.create_model("deit_small_patch16_224").eval()

    def inputs(self) -> torch.Tensor:
        return torch.empty(2, 3, 224, 224, device="meta")


DEIT_SMALL = DeitSmall()
deit_small = pytest.mark.xdist_group("DeiT-S")


@pytest.mark.nightly
@deit_small
def test_dead_tokens_save_what_the_method_says() -> None:
    report = optimised(DEIT_SMALL, flops_budget=1.0).report
    assert round(report.flops_before / 2e9, 2) == 4.60, "GMACs of DeiT-S"
    assert 1 - report.flops_ratio == pytest.approx(0.069, abs=5e-4)


@pytest.mark.nightly
@deit_small
def test_the_papers_counts() -> None:
    """Uniform P = 8 does not meet 0.74 on its own; P = 7 does once dead tokens are gone.

    The paper's ratios leave GTP's own work out, which is half a percent: the cosine similarities above all. A spatial
    graph has none of those, and P = 7 stays within a strict 0.74 with everything counted; the mixed graph misses it by
    3e-4.
    """
    for count, published in ((8, 0.743), (9, 0.712)):
        own_work = (
            optimised(DEIT_SMALL, schedule=[count] * 12, disabled_passes=WITH_DEAD_TOKENS).report.flops_ratio
            - published
        )
        assert 0 < own_work < 6e-3
    for graph, count in (("spatial", 7), ("mixed", 8)):
        strategy = gtp_fx.GTP(graph=graph)
        fast = optimised(DEIT_SMALL, flops_budget=0.74, schedule="uniform", strategy=strategy)
        assert set(fast.schedule.removed[:-1]) == {count}
        assert fast.report.flops_ratio <= 0.74
