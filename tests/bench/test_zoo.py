"""The zoo's bench: some rows run here at reduced depth; the committed result covers every model, none of them wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.zoo import Row, command, measure, summary, table
from bench.zoo_models import ZOO, ZooModel

from support.checkout import ROOT

RESULT = ROOT / "bench" / "results" / "zoo.json"
BY_NAME = {(model.library, model.name): model for model in ZOO}


def committed() -> list[Row]:
    rows = json.loads(RESULT.read_text())["rows"]
    return [Row(**{**row, "wrong": tuple(row["wrong"])}) for row in rows]


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("library", "name", "outcome"),
    [
        ("timm", "deit_small_patch16_224", "reduced"),
        ("timm", "vit_small_patch16_18x2_224", "reduced"),
        ("timm", "levit_128", "reduced"),
        ("timm", "coat_lite_tiny", "refused"),
        ("transformers", "ViT-MAE", "reduced"),
        ("timm", "convnext_tiny", "refused"),
    ],
)
def test_rows_at_reduced_depth(library: str, name: str, outcome: str) -> None:
    row = measure(BY_NAME[library, name], reduced=True)
    assert (row.outcome, row.wrong) == (outcome, ())
    assert row.doors.startswith("agree")
    assert bool(row.reason) == (outcome == "refused")


def test_every_model_has_a_committed_row_and_none_is_wrong() -> None:
    rows = committed()
    assert [(row.library, row.name) for row in rows] == list(BY_NAME)
    assert len(rows) >= 65
    assert [row.name for row in rows if row.wrong] == []
    assert all(row.outcome == "reduced" or row.reason for row in rows)


def test_the_readme_shows_the_committed_result() -> None:
    assert summary(committed()) in (ROOT / "docs" / "models.md").read_text(), (
        "paste what `python -m bench.zoo --summary` prints"
    )
    assert table(committed(), "github") in (RESULT.with_suffix(".md")).read_text()


def test_a_model_that_crashes_is_a_wrong_row() -> None:
    def broken(reduced: bool) -> None:
        raise RuntimeError("no such weights")

    row = measure(ZooModel("broken", "none", "none", broken))  # type: ignore[arg-type]
    assert (row.outcome, row.wrong) == ("crashed", ("RuntimeError: no such weights",))


def test_the_command_prints_writes_and_fails_where_a_row_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Row("a", "timm", "ViT", "reduced", gflops=2.0, ratio=0.73, sites=2, blocks=3, exact=1e-7, doors="agree")
    made = {"deit_small_patch16_224": good, "resnet50": replace(good, name="b", wrong=("doors: apart by 1e-1",))}
    monkeypatch.setattr("bench.zoo.measure", lambda entry, *_: made[entry.name])
    out = tmp_path / "zoo.json"
    run = CliRunner().invoke(command, ["--only", "deit_small", "--out", str(out)])
    assert (run.exit_code, json.loads(out.read_text())["rows"][0]["ratio"]) == (0, 0.73)
    assert "2 of 3" in run.output and "1 reduced" in run.output
    assert CliRunner().invoke(command, ["--only", "resnet50"]).exit_code == 1
    unknown = CliRunner().invoke(command, ["--only", "nonesuch"])
    assert unknown.exit_code == 2 and "nonesuch" in unknown.output
