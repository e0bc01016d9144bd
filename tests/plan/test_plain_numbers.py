"""Options from numpy and torch are the numbers that they hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import gtp_fx
from gtp_fx.options.calibration import Calibration
from gtp_fx.options.options import Options


@pytest.mark.parametrize("number", [np.float64, np.float32, torch.tensor])
def test_a_budget_of_any_kind(number: Any) -> None:
    assert Options.of(flops_budget=number(0.75)) == Options.of(flops_budget=0.75)
    assert Options.of(latency_budget=number(0.5)) == Options.of(latency_budget=0.5)


@pytest.mark.parametrize("counts", [np.array([8, 0]), torch.tensor([8, 0]), [np.int64(8), torch.tensor(0)]])
def test_counts_of_any_kind(counts: Any) -> None:
    assert Options.of(schedule=counts, batch=np.int64(4)) == Options.of(schedule=[8, 0], batch=4)


def test_strategies_and_calibration_hold_plain_numbers() -> None:
    strategy = gtp_fx.GTP(neighbors=np.int64(4), alpha=torch.tensor(0.5))
    assert strategy == gtp_fx.GTP(neighbors=4, alpha=0.5) and type(strategy.neighbors) is int
    made = gtp_fx.strategies.Regeneration(difficulty=np.float64(2.0))
    assert type(made.difficulty) is float
    assert type(Calibration(torch.zeros(2, 3, 8, 8), points=np.int64(3)).points) is int


def test_what_is_no_number_is_still_refused() -> None:
    with pytest.raises(gtp_fx.OptionError, match="flops_budget"):
        Options.of(flops_budget=torch.ones(2, 2))
