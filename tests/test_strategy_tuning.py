"""Tuning without labels: never worse, by its own judge, than what it began with; refusals are told, not hidden."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import gtp_fx
from gtp_fx.damage.agreement import neighbour_agreement
from gtp_fx.damage.divergence import divergence

from zoo import BY_NAME, build, images

ROW = BY_NAME["vit-gap"]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build(ROW)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GTP_FX_CACHE", str(tmp_path))
    return tmp_path


@torch.no_grad()
def test_it_finds_what_moves_outputs_least(model: nn.Module) -> None:
    x = images(ROW, 4)
    calibration = gtp_fx.Calibration(x, points=2, refine=2, strategy=True, progress=False)
    starts = ("gtp", "tome", "topk")
    tuned = gtp_fx.tune_strategy(model, calibration, flops_budget=0.6, strategies=starts)
    assert [trial.asked.name for trial in tuned.trials] == list(starts)
    assert "no prefix token" not in tuned.trials[0].refusal and "can't work on this model" in tuned.trials[2].refusal
    assert tuned.moved == min(trial.moved for trial in tuned.trials if not trial.refusal)
    fast = gtp_fx.optimize(model, strategy=tuned.strategy, schedule=tuned.schedule, compile=False)
    assert fast.report.flops_ratio <= 0.6
    assert divergence(fast(x), model(x)) == pytest.approx(tuned.moved, rel=1e-3)
    default = gtp_fx.optimize(model, flops_budget=0.6, compile=False)
    assert tuned.moved <= divergence(default(x), model(x)) + 1e-9
    assert "divergence" in str(tuned)
    with pytest.raises(gtp_fx.OptionError, match="strategies="):
        gtp_fx.tune_strategy(model, x, flops_budget=0.6, strategies=())
    with pytest.raises(gtp_fx.UnsupportedModelError, match="topk"):
        gtp_fx.tune_strategy(model, calibration, flops_budget=0.6, strategies=("topk",))


def test_what_calibration_chose_is_what_trains(model: nn.Module) -> None:
    calibration = gtp_fx.Calibration(images(ROW, 4), points=2, refine=1, strategy=True, progress=False)
    fast = gtp_fx.optimize(model, flops_budget=0.6, calibration=calibration, compile=False)
    assert fast.strategy != gtp_fx.GTP(), "on these images another one moves outputs less, or this proves nothing"
    x = images(ROW)
    expected = fast(x)
    torch.testing.assert_close(fast.train()(x), expected, rtol=1e-4, atol=1e-4)


def test_neighbours_agree_as_their_features_do() -> None:
    """With the identity for blocks the stream keeps what entered: nearest neighbours agree most, and more than chance."""
    model, x = build(ROW), images(ROW, 3)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.proj.weight.zero_()
            block.mlp.fc2.weight.zero_()
    found = neighbour_agreement(model, x)
    assert found.counts == (4, 8, 16, 32) and len(found.by_block) == 3
    for row in found.by_block:
        assert 1 >= row[0] > row[1] > row[2] > row[3] > 0
        assert row == pytest.approx(found.by_block[0], abs=0.05)
    proposed = found.proposed(gtp_fx.GTP(score="broadcast-mean"))
    assert proposed.score == "broadcast-mean" and proposed.neighbors in found.counts and 0 < proposed.alpha <= 0.4
    assert "M=8" in str(found)
