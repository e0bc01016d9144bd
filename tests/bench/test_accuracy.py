"""bench.accuracy and bench.tuning: a small run's rows are right and are kept; tables and pictures say what rows say."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image

from bench import accuracy, accuracy_report, tuning
from bench.accuracy import Photographs, Row, measure
from bench.contenders import CONTENDERS, Contender, contenders
from bench.digit_nets import NETS, NetConfig
from bench.digits import Look
from bench.photographs import PostNormNet

TINY = NetConfig(
    look=Look(side=32, pieces=2, strokes=1), width=16, depth=3, heads=2, close_ups=1, close_up=24, steps=1, batch=4
)


@pytest.fixture(autouse=True)
def tiny_nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GTP_FX_CACHE", str(tmp_path))
    for name, config in (("digits-cls", TINY), ("digits-pooled", replace(TINY, class_token=False))):
        monkeypatch.setitem(NETS, name, config)


@pytest.mark.nightly
def test_rows_are_measured() -> None:
    asked = [Contender("gtp", "auto"), Contender("tome", "even"), Contender("cluster", "auto")]
    rows = measure("digits-pooled", 0, asked, (0.8, 0.1), 32)
    assert [row.key for row in rows] == [
        ("digits-pooled", 0, c.strategy, c.schedule, b) for c in asked for b in (0.8, 0.1)
    ]
    for row in rows:
        assert (
            (row.flops_ratio <= row.budget and 0 <= row.score <= 1 and row.moved > 0)
            if not row.refusal
            else row.score == 0
        )
    assert rows[0].flops_ratio > 0 and any("can't be reached" in row.refusal for row in rows)


@pytest.mark.nightly
def test_rows_that_are_there_stay(tmp_path: Path) -> None:
    out, options = (
        tmp_path / "a.json",
        {"seed": [0], "net": ["digits-cls"], "budget": [0.7], "test_images": 16, "workers": 1},
    )
    asked = contenders(CONTENDERS)
    kept = [Row("digits-cls", 0, c.strategy, c.schedule, 0.7, 0.5, 0.7, 0.25, 0.1, (1, 2, 3)) for c in asked]
    accuracy._write(kept, 16, out)
    accuracy.main(**options, strategy=None, out=out, table=tmp_path / "a.md", plot=tmp_path / "a.png")
    assert {row["score"] for row in json.loads(out.read_text())["rows"]} == {0.25}, "nothing was left to measure"
    assert "-25.0" in (tmp_path / "a.md").read_text() and (tmp_path / "a.png").stat().st_size > 10_000


@pytest.fixture
def photographs(tmp_path: Path) -> Photographs:
    """Two photographs of noise a class and split, and a net that was never trained."""
    noise = np.random.default_rng(0)
    for split, label in itertools.product(("train", "test"), range(10)):
        folder = tmp_path / "data" / split / f"class{label}"
        folder.mkdir(parents=True)
        for number in range(2):
            pixels = noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.jpg")
    torch.manual_seed(0)
    torch.save(PostNormNet().state_dict(), tmp_path / "net.pth")
    return Photographs(tmp_path / "data", tmp_path / "net.pth")


@pytest.mark.nightly
def test_a_net_of_somebody_elses_is_measured_on_photographs(photographs: Photographs) -> None:
    (row,) = measure("photographs", 0, [Contender("regeneration", "auto")], (0.6,), 20, photographs)
    assert row.refusal == "" and 0.5 < row.flops_ratio <= 0.6 and row.moved > 0
    assert round(20 * row.base) == 20 * row.base, "a share of the twenty photographs"


def test_photographs_that_are_not_given_are_asked_for() -> None:
    with pytest.raises(typer.BadParameter, match="photographs needs --data and --weights"):
        accuracy.main(net=["photographs"])
    with pytest.raises(typer.BadParameter, match="photographs-cls needs --data"):
        accuracy.main(net=["photographs-cls"])


def test_what_is_not_reached_counts_as_the_worst() -> None:
    rows = [
        Row("a", 0, "gtp", "auto", 0.5, 0.9, 0.5, 0.88),
        Row("a", 0, "tome", "auto", 0.5, 0.9, 0.5, 0.80),
        Row("a", 0, "ppt", "auto", 0.5, 0.9, refusal="can't be reached"),
        Row("a", 0, "ppt", "auto", 0.7, 0.9, 0.7, 0.90),
        Row("a", 0, "gtp", "auto", 0.7, 0.9, 0.7, 0.90),
        Row("a", 0, "tome", "auto", 0.7, 0.9, 0.7, 0.90),
    ]
    found = {line[0]: line for line in accuracy_report.overall(rows)}
    assert found["gtp"][2] == pytest.approx(-1) and found["tome"][2] == pytest.approx(-5)
    assert found["ppt"][2] == pytest.approx(-5) and found["ppt"][4] == 1
    assert next(iter(accuracy_report.overall(rows)))[0] == "gtp"


def test_what_was_chosen_is_held_against_the_best_in_hindsight() -> None:
    rows = [
        Row("a", 0, "gtp", "even", 0.5, 0.9, 0.5, 0.88),
        Row("a", 0, "tome", "auto", 0.5, 0.9, 0.5, 0.89),
        Row("a", 0, "auto", "calibrated", 0.5, 0.9, 0.5, 0.87, chosen="GTP()"),
        Row("b", 0, "gtp", "even", 0.5, 0.9, 0.5, 0.88),
    ]
    table = accuracy_report.hindsight(rows)
    assert "| a" in table and "-3.0; -1.0 (tome, auto)" in table and "| b" not in table
    assert table in accuracy_report.markdown(rows) and "hindsight" not in accuracy_report.markdown(rows[:2])
    assert [str(c) for c in contenders(["auto"])] == ["auto, calibrated"]
    with pytest.raises(ValueError, match="strategies are"):
        Contender("auto", "even")


@pytest.mark.nightly
def test_auto_is_chosen_on_the_calibration_split() -> None:
    (row,) = measure("digits-cls", 0, contenders(["auto"]), (0.7,), 16)
    assert row.flops_ratio <= 0.7 and row.chosen and row.schedule == "calibrated"


@pytest.mark.nightly
def test_ways_of_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "ALPHAS", (0.1,))
    monkeypatch.setattr(tuning, "NEIGHBORS", (4,))
    monkeypatch.setattr(tuning, "SCORES", ("mixed-max", "broadcast-mean"))
    rows = tuning.measure("digits-cls", 0, [0.6], 8, 16)
    assert [row.way for row in rows] == list(tuning.WAYS) and all(row.flops_ratio <= 0.6 for row in rows)
    assert "digits-cls" in tuning.table(rows)
