"""The command line and the benchmark, as a person runs them: what they print, what they write, how they fail."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import typer
from typer.testing import CliRunner, Result

import gtp_fx
from bench.eager_vs_compiled import main as bench_main
from gtp_fx.cli import app as cli
from gtp_fx.cli.photo import load_photo

from support.checkout import ROOT
from support.printed import in_one_line

DATA = str(ROOT / "gtp_fx" / "cli" / "data")  # the packaged photograph's folder
NAME = "test_vit"  # timm's own for tests: 0.4 M parameters


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def test_version() -> None:
    assert run("--version").output.strip() == f"gtp-fx {gtp_fx.__version__}"


def test_optimises_checks_and_says_what_the_weights_are() -> None:
    done = run("optimize", NAME, "--flops-budget", "0.7", "--no-timing", "--batch", "3")
    assert done.exit_code == 0, done.output
    assert f"{NAME}, weights: random (seed 0), not a trained model; float32 on cpu" in in_one_line(done.stdout)
    lines = done.stdout.splitlines()
    assert "(budget 0.7)" in in_one_line(done.stdout)
    assert "blocks.0.attn" in done.stdout
    assert "strategy regeneration\n  score='broadcast-mean'," in done.stdout
    start = lines.index(next(line for line in lines if line.startswith("pass  ")))
    tables = lines[start : lines.index("left as it was:")]  # of passes, and of the three sites
    assert sum("blocks." in line for line in tables) == 3
    assert "on 3 views of the photograph" in in_one_line(done.stdout)
    assert max(map(len, lines)) <= 80


def test_json_is_all_there_is_on_stdout() -> None:
    done = run("optimize", NAME, "--schedule", "9,0,0,0,0,0", "--no-timing", "--batch", "2", "--json")
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["schedule"]["removed"] == [9, 0, 0, 0, 0, 0]
    assert found["report"]["flops_ratio"] < 1
    assert 0 < found["agreement"]["cosine_least"] <= 1
    assert found["comparison"] is None


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["deit_smal_patch16_224", "--flops-budget", "0.7"], "did you mean deit_small"),
        ([NAME], "no budget: give --flops-budget"),
        ([NAME, "--flops-budget", "1.5"], "flops_budget=1.5 is no ratio"),
        ([NAME, "--flops-budget", "0.01"], "the lowest ratio"),
        ([NAME, "--flops-budget", "0.7", "--schedule", "1,2,x"], "--schedule '1,2,x' is neither"),
        ([NAME, "--flops-budget", "0.7", "--schedule", "evenly"], "schedule='evenly' is unknown"),
        ([NAME, "--flops-budget", "0.7", "--batch", "0"], "give the images of a run"),
        ([NAME, "--flops-budget", "0.7", "--rounds", "0"], "--rounds 0: give at least one"),
        ([NAME, "--flops-budget", "0.7", "--weights", "no/such/file"], "can't be read"),
        ([NAME, "--flops-budget", "0.7", "--mode", "fastest"], "mode='fastest' is unknown"),
        ([NAME, "--flops-budget", "0.7", "--mode", "max-autotune", "--no-timing"], "--no-timing compiles nothing"),
        ([NAME, "--flops-budget", "0.7", "--calibration", "no/such/folder"], "no/such/folder is no folder"),
        ([NAME, "--flops-budget", "0.7", "--calibration", DATA, "--schedule", "even"], "is 'even': give one"),
        (["test_convnext", "--flops-budget", "0.7"], "no self-attention over patch tokens"),
    ],
)
def test_a_users_error_is_one_message_and_exit_code_2(arguments: list[str], told: str) -> None:
    done = run("optimize", *arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith("gtp-fx: ")
    assert told in in_one_line(done.stderr)
    assert "Traceback" not in done.output


@pytest.mark.nightly
def test_photographs_in_a_folder_choose_the_strategy(tmp_path: Path) -> None:
    for number in range(3):
        folder = tmp_path / "photographs" / str(number)
        folder.mkdir(parents=True)
        load_photo().rotate(30 * number).save(folder / "a.JPG", format="JPEG")
    (tmp_path / "photographs" / "labels.txt").write_text("0 1 2")
    budget = ("--flops-budget", "0.7", "--strategy", "auto", "--no-timing", "--batch", "1")
    done = run("optimize", NAME, *budget, "--calibration", str(tmp_path / "photographs"), "--json")
    report = json.loads(done.stdout)["report"]
    best = report["contenders"][0]
    assert best["images"] == 3 and best["moved"] == report["moved"] and best["strategy"] == report["strategy"]


def test_weights_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(timm.create_model(NAME).state_dict(), path)
    done = run("optimize", NAME, "--flops-budget", "0.7", "--no-timing", "--batch", "1", "--weights", str(path))
    assert f"weights: file {path}" in in_one_line(done.stdout)


@pytest.mark.nightly
@pytest.mark.usefixtures("without_kernels")
def test_the_benchmark_writes_what_it_measured_and_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Compiles both models, so also what `gtp-fx optimize` times."""
    path = tmp_path / "results" / "one.json"
    bench_main(model=NAME, batch=2, budget=0.9, rounds=2, out=path)
    found = json.loads(path.read_text())
    assert set(found["environment"]["versions"]) == {"python", "torch", "timm", "transformers", "triton"}
    assert found["environment"]["processor"]
    comparison = found["comparison"]
    assert comparison["rounds"] == 2
    assert comparison["flops_ratio"] <= 0.9
    for name in ("optimised eager", "optimised compiled"):
        ratio = comparison["speed_up"][name]["median"]
        assert ratio > 0
        assert comparison["share_of_limit"][name] == pytest.approx(ratio * comparison["flops_ratio"])
    assert comparison["compilations"]["optimised compiled"]["error"] < 1e-3
    assert "images/s" in capsys.readouterr().err


def test_the_benchmark_fails_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        bench_main(model=NAME, budget=1.5)
    assert "flops_budget=1.5 is no ratio" in capsys.readouterr().err


@pytest.mark.nightly
def test_a_checkout_runs_without_being_installed(tmp_path: Path) -> None:
    """Run from a copy, as where nothing can be installed, so that this environment's install isn't found."""
    for folder in ("gtp_fx", "passes", "targets", "bench"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    modules = ("gtp_fx", "gtp_fx.passes.exact.mark_blocks", "gtp_fx.targets.cpu", "bench.eager_vs_compiled")
    code = f"import {', '.join(modules)}, sys; print(*[sys.modules[m].__file__ for m in {modules}])"
    done = subprocess.run((sys.executable, "-c", code), cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [path.startswith(str(tmp_path)) for path in done.stdout.split()] == [True] * len(modules)


@pytest.mark.nightly
def test_inspect_says_what_is_seen() -> None:
    done = run("inspect", "swin_s3_tiny_224", "--json")
    found: dict[str, Any] = json.loads(done.stdout)
    assert {row["can"] for row in found["blocks"]} == {"skip a branch"}
    assert found["blocks"][0]["grid"] == [7, 7] and all(row["why"] for row in found["blocks"])
    done = run("inspect", NAME)
    assert done.exit_code == 0, done.output
    assert "takes (float32[*, 3, 160, 160])" in done.stdout
    assert "10 x 10" in done.stdout and "leave" in done.stdout
    assert "not needed: no output depends on patch tokens" in done.stdout
    assert "no self-attention over patch tokens" in run("inspect", "resnet10t").stdout
