"""Bad input: each a clear error with the bad value and the good ones, and nothing half done."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from torch import nn

import gtp_fx
from gtp_fx.model.backend import gtp

from support.captured import optimised
from support.zoo import BY_NAME, build, in_tiers

ROW = BY_NAME["vit"]


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return build(ROW)


@pytest.mark.parametrize("budget", [0, 0.0, -0.1, 1.5, math.nan, math.inf, "0.7", True])
def test_budgets_outside_the_range(vit: nn.Module, budget: Any) -> None:
    with pytest.raises(gtp_fx.OptionError, match="0 < flops_budget <= 1"):
        gtp_fx.optimize(vit, flops_budget=budget)


@pytest.mark.xdist_group("vit")
@pytest.mark.parametrize("schedule", ["auto", "uniform"])
def test_a_budget_below_what_can_be_reached_names_the_lowest(schedule: str) -> None:
    with pytest.raises(gtp_fx.BudgetError, match=r"lowest ratio .* is 0\.\d{3}") as error:
        optimised(ROW, flops_budget=0.02, schedule=schedule)
    lowest = error.value.lowest
    assert lowest is not None and f" is {lowest:.3f}" in str(error.value)
    fast = optimised(ROW, flops_budget=lowest, schedule=schedule)
    assert fast.report.flops_ratio <= lowest, "the ratio named can be asked for"


@pytest.mark.xdist_group("vit")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give flops_budget="),
        ({"schedule": "linear", "flops_budget": 0.7}, "'auto', 'even', 'uniform'"),
        ({"schedule": 8}, "sequence of integers"),
        ({"schedule": [8, -1, 0]}, "integer of 0 or more"),
        ({"schedule": [8, 0.5, 0]}, "integer of 0 or more"),
        ({"schedule": [8, 8]}, "2 entries and the model 3 attention blocks"),
        ({"schedule": [100, 96, 0]}, "removes 196 patch tokens by block 1, of 196"),
        ({"schedule": [1, 1, 0], "flops_budget": 0.5}, "over flops_budget=0.5"),
        ({"flops_budget": 0.7, "strategy": "magic"}, "'gtp'"),
        ({"flops_budget": 0.7, "strategy": gtp_fx.GTP}, "a strategy value"),
        ({"flops_budget": 0.7, "target": "tpu"}, "'cpu'"),
        ({"flops_budget": 0.7, "strategy": gtp_fx.GTP(neighbors=196)}, "more than 196 patch tokens"),
        (
            {"schedule": gtp_fx.Schedule((1, 1, 1), (gtp_fx.BlockShape(64, 192, 64),) * 3)},
            "another model or image size",
        ),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(gtp_fx.GtpError) as error:
        optimised(ROW, **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"score": "best"},
        {"graph": "full"},
        {"neighbors": 0},
        {"neighbors": 2.5},
        {"alpha": -1},
        {"alpha": math.nan},
        {"attention_sparsity": 0},
        {"attention_sparsity": 1.1},
        {"token_scale": 1},
    ],
)
def test_strategy_values_are_checked_where_they_are_made(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(gtp_fx.OptionError, match=name) as error:
        gtp_fx.GTP(**options)
    assert repr(value) in str(error.value)


def test_cls_scores_need_a_cls_token() -> None:
    with pytest.raises(gtp_fx.UnsupportedModelError, match="no prefix token"):
        gtp_fx.optimize(build(BY_NAME["vit-gap"]), flops_budget=0.7, strategy=gtp_fx.GTP(score="cls-max"))


@pytest.mark.parametrize("budget", in_tiers([0.74, 1.0], 0.74))
def test_a_convnet_is_refused(budget: float) -> None:
    model = timm.create_model("resnet10t").eval()
    with pytest.raises(gtp_fx.UnsupportedModelError, match=r"no self-attention over patch tokens .* convolutions"):
        gtp_fx.optimize(model, flops_budget=budget)


def test_no_module() -> None:
    with pytest.raises(gtp_fx.OptionError, match=r"no nn\.Module"):
        gtp_fx.optimize("deit_small_patch16_224", flops_budget=0.7)  # type: ignore[arg-type]


def test_inputs_that_nothing_tells() -> None:
    with pytest.raises(gtp_fx.CaptureError, match="example_inputs="):
        gtp_fx.optimize(nn.Linear(3, 3), flops_budget=0.7)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.zeros(2, 3, 64, 64), "can't be captured"),
        (torch.zeros(0, 3, 224, 224), "no image"),
        ((torch.zeros(2, 3, 224, 224), 1, 2, 3), "don't fit"),
        (7, "give a tensor"),
        ((), "hold no tensor"),
    ],
)
def test_inputs_that_do_not_fit(vit: nn.Module, inputs: Any, message: str) -> None:
    with pytest.raises(gtp_fx.CaptureError) as error:
        gtp_fx.optimize(vit, flops_budget=0.7, example_inputs=inputs)
    assert message in str(error.value)


def test_a_call_of_another_size(vit: nn.Module) -> None:
    fast = gtp_fx.optimize(vit, schedule=[20, 0, 0], compile=False)
    for shape in ((2, 3, 192, 192), (3, 224, 224), (2, 1, 224, 224)):
        with pytest.raises(gtp_fx.InputError, match=r"\[\*, 3, 224, 224\]"):
            fast(torch.zeros(shape))
    with pytest.raises(gtp_fx.InputError, match="can't be called"):
        fast(torch.zeros(2, 3, 224, 224), nonsense=1)


def test_a_model_that_changes_itself_in_training_is_refused() -> None:
    class Counting(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls.add_(1)
            return self.inner(x) / self.calls

    model = Counting(build(ROW))
    with pytest.raises(gtp_fx.CaptureError, match="changes calls"):
        gtp_fx.optimize(model, flops_budget=0.7, example_inputs=torch.zeros(2, 3, 224, 224))


def test_the_backend_names_the_options_it_knows() -> None:
    graph = torch.fx.symbolic_trace(nn.Identity())
    with pytest.raises(
        gtp_fx.OptionError,
        match=r"'flops_budgett'; did you mean 'flops_budget'\? "
        r"The backend knows flops_budget, latency_budget, batch, schedule, strategy",
    ):
        gtp(graph, [], options={"flops_budgett": 0.7})
    with pytest.raises(gtp_fx.OptionError, match="mode='fastest'"):
        gtp(graph, [], options={"flops_budget": 0.7, "mode": "fastest"})
