"""Damage measured on unlabelled images: what is measured, that it ascends and is kept, that the choice is no worse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gtp_fx
from bench.agreement import neighbour_agreement
from gtp_fx.model.pipeline import Optimised
from gtp_fx.options.calibration import Calibration
from gtp_fx.plan.damage.divergence import divergence
from gtp_fx.plan.damage.refinement import Search
from gtp_fx.plan.damage.sensitivity import counts_to_measure
from gtp_fx.plan.damage.tables import Damage

from support.captured import optimised, shared_model
from support.zoo import BY_NAME, build, images

pytestmark = pytest.mark.xdist_group("vit-gap")

ROW = BY_NAME["vit-gap"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GTP_FX_CACHE", str(tmp_path))
    return tmp_path


def calibrated(budget: float = 0.7, **options: Any) -> Optimised:
    value = Calibration(options.pop("images", images(ROW)), points=2, progress=False, **options)
    return optimised(ROW, flops_budget=budget, calibration=value)


@torch.no_grad()
def moved(fast: Optimised, x: Tensor) -> float:
    return divergence(fast.graph_module(x), shared_model(ROW)(x))


@pytest.mark.nightly
def test_outputs_move_no_more_than_by_any_other_way_it_tried() -> None:
    x = images(ROW)
    fast = calibrated()
    assert fast.report.flops_ratio <= 0.7
    assert "measurement on" in fast.report.damage_from
    own = moved(fast, x)
    for schedule in ("auto", "uniform", "even"):
        other = optimised(ROW, flops_budget=0.7, schedule=schedule)
        assert own <= moved(other, x) + 1e-9


@pytest.mark.nightly
def test_refining_lowers_it() -> None:
    x = images(ROW)
    plain, refined = calibrated(), calibrated(refine=3)
    assert refined.report.flops_ratio <= 0.7
    assert moved(refined, x) <= moved(plain, x) + 1e-9


@pytest.mark.nightly
@torch.no_grad()
def test_reports_say_how_far_outputs_moved_so_that_strategies_can_be_compared() -> None:
    x = images(ROW, 4)
    calibration = Calibration(x, points=2, refine=2, progress=False)
    made = {name: optimised(ROW, flops_budget=0.6, strategy=name, calibration=calibration) for name in ("gtp", "tome")}
    for fast in made.values():
        assert moved(fast, x) == pytest.approx(fast.report.moved, rel=1e-3)
        again = optimised(ROW, strategy=fast.strategy, schedule=fast.schedule)
        assert torch.equal(again.graph_module(x), fast.graph_module(x)) and again.report.moved is None
    default = optimised(ROW, flops_budget=0.6)
    assert made["gtp"].report.moved <= moved(default, x) + 1e-9
    with pytest.raises(gtp_fx.UnsupportedModelError, match="topk"):
        optimised(ROW, flops_budget=0.6, strategy="topk", calibration=calibration)


@pytest.mark.nightly
def test_measurements_are_kept_by_weights_and_images(cache: Path) -> None:
    first = calibrated()
    (file,) = cache.rglob("*.json")
    before = file.stat().st_mtime_ns
    values = json.loads(file.read_text())["values"]
    calibrated()
    assert file.stat().st_mtime_ns == before, "everything was known"
    assert calibrated(budget=0.8).schedule != first.schedule
    more = json.loads(file.read_text())["values"]
    assert more.items() > values.items() and len(more) - len(values) <= 4, "whole schedules alone, and no table again"
    calibrated(images=images(ROW).flip(0) * 2)
    assert len(list(cache.rglob("*.json"))) == 2
    file.write_text("not json")
    assert calibrated().schedule == first.schedule
    calibrated(cache=False)
    assert len(list(cache.rglob("*.json"))) == 2


@pytest.mark.nightly
def test_other_weights_are_measured_anew(cache: Path) -> None:
    for seed in (0, 1):
        value = Calibration(images(ROW), points=2, progress=False)
        gtp_fx.optimize(build(ROW, seed=seed), flops_budget=0.7, calibration=value, compile=False)
    assert len(list(cache.rglob("*.json"))) == 2


@pytest.mark.nightly
def test_batches_and_keyword_arguments() -> None:
    x = images(ROW)
    whole = calibrated()
    assert calibrated(images=[x[:1], x[1:]]).schedule == whole.schedule
    assert calibrated(images=[{"x": x}]).schedule == whole.schedule


@pytest.mark.nightly
def test_a_latency_budget_is_kept_too() -> None:
    value = Calibration(images(ROW), points=2, progress=False)
    fast = optimised(ROW, latency_budget=0.8, target="h100", batch=256, calibration=value)
    before, after = fast.report.seconds or (0, 1)
    assert after <= 0.8 * before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": 3}, "a tensor of images"),
        ({"calibration": []}, "a tensor of images"),
        ({"calibration": torch.randn(2, 3, 32, 32)}, "was optimised for"),
        ({"calibration": torch.randn(2, 3, 32, 32), "schedule": "uniform"}, "give one"),
    ],
)
def test_calibrations_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(gtp_fx.GtpError) as error:
        optimised(ROW, flops_budget=0.7, **options)
    assert message in str(error.value)


@pytest.mark.parametrize("options", [{"points": 0}, {"refine": -1}, {"points": True}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(gtp_fx.OptionError, match="calibration='pictures/': give a tensor of images"):
        gtp_fx.Calibration("pictures/").batches()
    with pytest.raises(gtp_fx.OptionError, match="Calibration"):
        Calibration(torch.zeros(1), **options)


def test_the_backend_says_where_to_calibrate() -> None:
    from gtp_fx.options.options import Options

    with pytest.raises(gtp_fx.OptionError, match=r"optimised\.schedule"):
        Options.of_backend({"flops_budget": 0.7, "calibration": torch.zeros(1)})


def test_divergence_of_scores_and_of_features() -> None:
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    p, q = b.softmax(1), a.softmax(1)
    assert divergence(a, b) == pytest.approx(float((p * (p / q).log()).sum()))
    assert divergence({"logits": a}, {"logits": a}) == 0
    maps = torch.ones(2, 3, 4)
    assert divergence(maps * 1.1, maps) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("whole", [2, 7, 196, 4096])
@pytest.mark.parametrize("points", [1, 3, 8])
def test_counts_reach_from_some_to_all_but_one(whole: int, points: int) -> None:
    counts = counts_to_measure(whole, points)
    assert counts == sorted(set(counts))
    assert counts[-1] == whole - 1
    assert counts[0] >= 1
    assert len(counts) <= points


def test_damage_counts_shares_of_what_is_there() -> None:
    damage = Damage((np.arange(10.0), np.arange(10.0) ** 2), "a test")
    assert damage.step(0, 10, 10, 8) == pytest.approx(2 + 2)
    assert damage.step(1, 10, 5, 4) == pytest.approx((36 - 25) + 4), "a fifth of five is as two of ten"
    assert damage.step(1, 10, 5, 5) == 0
    with pytest.raises(ValueError, match="ascends"):
        Damage((np.array([0.0, 2.0, 1.0]),), "a test")


def test_a_search_finds_the_weights_that_matter() -> None:
    """Made-up damage in which block 1 is far worse than the tables say."""
    tables = Damage((np.arange(11.0), np.arange(11.0)), "a test")

    def solve(damage: Damage) -> tuple[int, ...]:
        return (10, 0) if damage.tables[0][1] < damage.tables[1][1] else (0, 10)

    judged: Iterator[float] | dict[tuple[int, ...], float] = {(10, 0): 1.0, (0, 10): 5.0}
    search = Search(lambda counts: judged[counts])  # type: ignore[index]
    search.try_out((0, 10))
    search.weigh_anew(tables, solve, 10)
    assert search.best == (10, 0)
    assert len(search.seen) == 2, "what was seen is not judged again"


def test_neighbours_agree_as_their_features_do() -> None:
    """Identity blocks keep the stream as it entered: nearest neighbours agree most, and more than chance."""
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
