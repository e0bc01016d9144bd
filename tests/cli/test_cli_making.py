"""`gtp-fx bench`, `export` and `show`: what they write, print and refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import gtp_fx
from gtp_fx.cli import app as cli
from gtp_fx.cli.photo import as_seen, load_photo, prepared
from gtp_fx.report.token_flow import token_flow

from support.printed import in_one_line
from support.zoo import BY_NAME, build, images, in_tiers

NAME = "test_vit"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.mark.nightly
@pytest.mark.usefixtures("without_kernels")
def test_bench_times_every_strategy_at_every_budget() -> None:
    budgets = ("--flops-budget", "0.8", "--flops-budget", "0.6")
    done = run(
        "bench",
        NAME,
        *budgets,
        "--strategy",
        "gtp",
        "--strategy",
        "tome",
        "--eager",
        "--rounds",
        "2",
        "--batch",
        "2",
        "--json",
    )
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)["benchmark"]
    assert found["how"] == "eager" and found["rounds"] == 2
    assert [row["name"] for row in found["entries"]] == [
        "gtp 0.8 FLOPs",
        "gtp 0.6 FLOPs",
        "tome 0.8 FLOPs",
        "tome 0.6 FLOPs",
    ]
    for row, budget in zip(found["entries"], (0.8, 0.6) * 2, strict=True):
        assert budget - 0.05 < row["flops_ratio"] <= budget and row["speed_up"]["median"] > 0
    assert set(found["seconds"]) == {"original", *(row["name"] for row in found["entries"])}


def test_bench_has_no_mode_for_what_it_does_not_compile() -> None:
    done = run("bench", NAME, "--flops-budget", "0.8", "--mode", "max-autotune", "--eager")
    assert done.exit_code == 2 and "--eager compiles nothing" in done.stderr


@pytest.mark.nightly
@pytest.mark.usefixtures("without_kernels")
def test_bench_compiles_both_sides() -> None:
    done = run("bench", NAME, "--model-arg", "depth=2", "--schedule", "30,0", "--rounds", "1", "--batch", "2")
    assert done.exit_code == 0, done.output
    assert "batch of 2, compiled against compiled; medians of 1 interleaved rounds" in done.stdout


@pytest.mark.nightly
def test_an_exported_schedule_makes_the_same_file_again(tmp_path: Path) -> None:
    first, schedule, second = tmp_path / "a.pt2", tmp_path / "s.json", tmp_path / "b.pt2"
    done = run("export", NAME, str(first), "--flops-budget", "0.7", "--save-schedule", str(schedule))
    assert done.exit_code == 0, done.output
    assert "run, within 0.0e+00 of the model" in done.stdout
    done = run("export", NAME, str(second), "--schedule", str(schedule), "--json")
    assert json.loads(done.stdout)["exported"]["error"] == 0
    x = torch.randn(3, 3, 160, 160)
    same = [torch.export.load(file).module()(x) for file in (first, second)]
    torch.testing.assert_close(*same, rtol=0, atol=0)


def test_show_draws_and_says_who_received_whom(tmp_path: Path) -> None:
    picture, out = tmp_path / "in.png", tmp_path / "tokens.png"
    load_photo().save(picture)
    done = run("show", NAME, str(picture), "--flops-budget", "0.7", "--out", str(out), "--json")
    assert done.exit_code == 0, done.output
    sites: list[dict[str, Any]] = json.loads(done.stdout)["sites"]
    assert Image.open(out).width > 1000
    before = set(range(100))
    for site in sites:
        kept, left = set(site["kept"]), set(site["removed"])
        assert kept | left == before and not kept & left
        assert all(set(to) <= kept for to in site["received_by"]) and len(site["received_by"]) == len(left)
        before = kept
    assert len(sites[-1]["scale"]) == len(before)


def test_show_replaces_no_picture_in_silence(tmp_path: Path) -> None:
    out = tmp_path / "tokens.png"
    out.write_bytes(b"mine")
    done = run("show", NAME, "--flops-budget", "0.7", "--out", str(out))
    assert (
        done.exit_code == 2
        and "tokens.png exists already: give --out" in in_one_line(done.stderr)
        and out.read_bytes() == b"mine"
    )


@pytest.mark.parametrize("strategy", in_tiers(["gtp", "tome", "topk"], "gtp", "tome"))
def test_a_journeys_end_is_its_provenance(strategy: str) -> None:
    row = BY_NAME["deit"]
    fast = gtp_fx.optimize(build(row), schedule=[60, 40, 0], strategy=strategy, compile=False)
    x = images(row, 1)
    *_, last = token_flow(fast.graph_module, fast.sites, fast.report.sites, x)
    (ended,) = fast.provenance(x)
    assert last.kept.tolist() == ended.index[0].tolist()
    if strategy == "gtp":  # the token scale is what a row of the matrix sums up to
        torch.testing.assert_close(last.scale, ended.matrix[0].sum(dim=1))
    else:  # averages: patches are counted, each once
        assert float(last.scale.sum()) == pytest.approx(row.patches)
        assert float(last.scale.max()) > 2


def test_a_report_draws_itself(tmp_path: Path) -> None:
    fast = gtp_fx.optimize(build(BY_NAME["deit"]), flops_budget=0.7, compile=False)
    fast.report.plot(tmp_path / "report.png")
    assert Image.open(tmp_path / "report.png").height > 500
    forecast = fast.report.forecast
    assert forecast is not None and forecast.after.flops == fast.report.flops_after


def test_what_the_model_sees_is_the_photograph() -> None:
    model = build(BY_NAME["deit"])
    seen = as_seen(model, prepared(model, load_photo()))
    assert seen.shape == (224, 224, 3)
    plain = (
        torch.frombuffer(bytearray(load_photo().resize((224, 224)).tobytes()), dtype=torch.uint8).view(224, 224, 3)
        / 255
    )
    assert float((seen.mean() - plain.mean()).abs()) < 0.05


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["bench", NAME], "no budget: give --flops-budget"),
        (["bench", NAME, "--flops-budget", "2"], "flops_budget=2.0 is no ratio"),
        (["export", NAME, "x.tflite", "--flops-budget", "0.7"], "give .pt2, .onnx or .cache"),
        (["export", NAME, "x.pt2", "--flops-budget", "0.7", "--format", "tf"], "--format tf: give torch, aoti, onnx"),
        (["export", NAME, "x.pt2", "--schedule", "no.json"], "schedule='no.json' can't be read"),
        (["show", NAME, "no.png", "--flops-budget", "0.7"], "no.png can't be read"),
        (["show", NAME, __file__, "--flops-budget", "0.7"], "is no picture that Pillow reads"),
        (["show", NAME, "--flops-budget", "1.0"], "no token leaves"),
        (["show", NAME, "--flops-budget", "0.7", "--out", "x.abc"], "plot x.abc: Format 'abc' is not supported"),
        (["show", NAME, "--flops-budget", "0.7", "--out", "no/x.png"], "no/x.png: no is no directory; make it first"),
        (["plan", NAME, "--flops-budget", "0.7", "--save-schedule", "no/x.json"], "no is no directory"),
        (["plan", NAME, "--latency-budget", "1us"], " ms)"),
        (["export", NAME, "no/x.pt2", "--flops-budget", "0.7"], "no is no directory"),
    ],
)
def test_a_users_error_is_one_message(arguments: list[str], told: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("gtp-fx: ") and told in in_one_line(done.stderr)
    assert "Traceback" not in done.output


def test_a_plan_names_what_it_leaves_as_it_is() -> None:
    """A count for a block without live patches can't be carried out, and a prediction may be of a slowdown."""
    done = run("plan", NAME, "--schedule", "1,1,1,1,1,1", "--target", "h100")
    assert done.exit_code == 0 and "left as it was:" in done.stdout and "blocks.5.attn" in done.stdout
    assert "predicted slower than the original" in in_one_line(done.stdout)


def test_a_choice_by_images_that_a_command_does_not_take_is_spoken_of() -> None:
    """`plan` has no images, so "auto" is the default there."""
    done = run("plan", NAME, "--flops-budget", "0.8", "--strategy", "auto")
    assert done.exit_code == 0 and "strategy regeneration" in done.stdout
    assert "--strategy auto: without photographs this is regeneration" in in_one_line(done.stderr)
