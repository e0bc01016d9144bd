"""Benches of schedules and of the cost model, on made-up rows and a tiny net: what they print, draw and write."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import cost_model, schedules
from bench.digit_nets import NetConfig
from gtp_fx.targets import CPU, detect
from gtp_fx.targets.tuned import save_tuned


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GTP_FX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.nightly
def test_schedules_measures_tells_and_draws(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = NetConfig(width=16, depth=3, heads=2, close_ups=1, steps=1, batch=4)
    monkeypatch.setattr(schedules, "NETS", {"CLS": tiny})
    monkeypatch.setattr(schedules, "_REFINE", 1)
    file, picture = cache / "rows.json", cache / "rows.png"
    schedules.main([0, 1], ["CLS"], [0.75], 20, 4, file, picture)
    found = json.loads(file.read_text())
    assert {row["way"] for row in found["rows"]} == set(schedules.WAYS)
    assert all(row["flops_ratio"] <= 0.75 for row in found["rows"])
    assert {summary["seeds"] for summary in found["summary"]} == {2}
    by_way = {(row["seed"], row["way"]): row["kl"] for row in found["rows"]}
    assert by_way[0, "auto"] >= 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_way_that_does_not_reach_a_budget_says_so() -> None:
    row = schedules.Row("CLS", 0, 0.3, schedules.AUTO, (9,), 0.3, 0.8, 0.9, 0.01)
    assert "not reached" in schedules.table([row])
    assert "-10.00 ± 0.00" in schedules.table([row])


ROW = cost_model.Row("a", 224, 4, 0.8, 0.8, (1, 2), 1.2, 1.25, (1.2, 1.3), (0.5, 0.4), (0.45, 0.36))


def test_the_cost_models_errors_are_of_the_speed_up(tmp_path: Path) -> None:
    rows = [ROW, replace(ROW, model="b", predicted=1.5)]
    assert rows[0].error == pytest.approx(-0.04)
    assert cost_model.median_error(rows) == pytest.approx(0.12)
    assert "median error of the speed-up 12.0%" in cost_model.table(rows)
    cost_model.draw(rows, CPU, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_rows_of_the_same_curves_are_not_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    target = replace(CPU, measured="today")
    cost_model.publish_rows([ROW], target, "float32", "cpu", 3, file)
    assert cost_model._known(file, target) == [ROW]
    assert cost_model._known(file, replace(target, measured="tomorrow")) == []


def test_the_cost_model_wants_a_measured_machine(capsys: pytest.CaptureFixture[str]) -> None:
    import typer

    with pytest.raises(typer.Exit):
        cost_model.main(1, None, None, cost_model.Dtype.float32, cost_model.Device.cpu, None, None)
    assert "gtp-fx tune" in capsys.readouterr().err


@pytest.mark.nightly
def test_a_row_is_predicted_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager in place of compiled, for the seconds that it saves."""
    save_tuned(replace(detect("cpu"), measured="for a test"))
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    monkeypatch.setattr(cost_model, "SUBJECTS", (cost_model.Subject("test_vit", 160, 2, 2, {}),))
    cost_model.main(2, None, [0.8], cost_model.Dtype.float32, cost_model.Device.cpu, None, None)
