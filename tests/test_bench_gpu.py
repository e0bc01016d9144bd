"""`python -m bench.gpu` but for the GPU: its own code on toy sizes, and that it says so where something is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

pytest.importorskip("triton")

from bench import gpu
from bench.gpu_checks import DRY, Check, run_checks
from bench.gpu_models import ModelRow
from gtp_fx.kernels.available import load_kernels

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the dry run wants Triton's interpreter")


def run(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(gpu.main)
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


@needs_no_gpu
def test_a_dry_run_checks_times_and_writes(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    code, printed = run("--dry-run", "--rounds", "1", "--out", str(file))
    assert code == 0, printed
    assert "no figure means anything" in printed and "WRONG" not in printed
    found = json.loads(file.read_text())
    assert found["dry_run"] is True and found["environment"]["versions"]["torch"] in torch.__version__
    assert {check["kernel"] for check in found["checks"]} > {"attend", "select", "propagate", "recover"}
    assert all(check["right"] for check in found["checks"])
    assert {row["kernel"] for row in found["kernels"]} == {"select", "propagate", "attend", "attend with scores"}
    (row,) = found["models"]
    assert row["flops_ratio"] <= 0.74 and row["error"] < 1e-3 and set(row["best"]) <= row["seconds"].keys()


def test_what_is_wrong_is_told_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    poison = Check("select", "(1, 2)", "float32", float("nan"), 1e-5)
    assert not poison.right
    monkeypatch.setattr(gpu, "run_checks", lambda *_: [Check("attend", "", "float32", 1e-7, 1e-5), poison])
    code, printed = run("--dry-run", "--only", "checks")
    assert code == 1 and "WRONG at (1, 2)" in printed


@needs_no_gpu
def test_a_kernel_that_leaves_its_output_unwritten_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    load_kernels()
    recover = torch.ops.gtp_fx_kernels.recover
    forgetful = lambda x, *rest: recover(x, *rest).new_empty(x.shape[0], x.shape[1] + rest[4].shape[1], x.shape[2])  # noqa: E731
    monkeypatch.setattr(torch.ops.gtp_fx_kernels, "recover", forgetful)
    assert not all(check.right for check in run_checks(torch.device("cpu"), DRY) if check.kernel == "recover")


def test_time_runs_out_between_rows() -> None:
    begun: list[int] = []
    left_out: list[str] = []

    def rows() -> Iterator[int]:
        for row in range(3):
            begun.append(row)
            yield row

    assert list(gpu._until(0.0, rows(), left_out, "models")) == [] and begun == []
    assert left_out == ["models behind the last row: time was over"]


@pytest.mark.parametrize(
    "arguments", [("--only", "nothing"), ("--dry-run", "--model", "nothing"), ("--only", "checks")]
)
def test_bad_arguments_are_a_sentence(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, printed = run(*arguments)
    assert (code == 2 and printed.startswith("gpu: ") and "give" in printed) or "--dry-run needs none" in printed


def test_the_saving_that_flops_promise() -> None:
    row = ModelRow("m", 224, 1, 0.75, (), {}, {}, 1 / 0.8, (1.2, 1.3), ("a", "b"), 0.0, 1.3)
    assert row.of_saving == pytest.approx(0.8)
