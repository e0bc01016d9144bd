"""Budgets of time, on this machine and on absent ones, and what `gtp-fx plan` and `tune` say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import gtp_fx
from gtp_fx.cli import app as cli
from gtp_fx.measure import probes as probing
from gtp_fx.model.planner import Planner
from gtp_fx.options.latency_budget import LatencyBudget
from gtp_fx.options.options import Options
from gtp_fx.report.forecast import BlockForecast, Cost, Forecast

from support.captured import optimised
from support.printed import in_one_line
from support.window_families import SWIN
from support.zoo import BY_NAME, build, images, in_groups

ROW = BY_NAME["vit"]
NAME = "test_vit"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GTP_FX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return build(ROW)


@pytest.fixture(scope="module")
def planner(vit: nn.Module) -> Planner:
    return Planner(vit, images(ROW))


@pytest.fixture(scope="module")
def swin() -> Planner:
    return Planner(SWIN.model(), SWIN.inputs())


@pytest.mark.parametrize("target", ["h200", "h100", "a100", "l4", "rtx4090", "cpu", "generic-gpu"])
def test_a_latency_budget_works_from_a_targets_table_alone(planner: Planner, target: str) -> None:
    found = planner.plan(Options.of(latency_budget=0.8, target=target, batch=256))
    assert found.after.seconds <= 0.8 * found.original.seconds
    assert found.after.seconds > 0.7 * found.original.seconds, "and spends what it may, in whole tiles"
    assert found.target == target


def test_an_absolute_budget_is_the_ratio_that_it_is(planner: Planner) -> None:
    ratio = planner.plan(Options.of(latency_budget=0.8, target="a100", batch=64))
    limit = f"{0.8 * ratio.original.seconds * 1e3:.9f}ms"
    assert planner.plan(Options.of(latency_budget=limit, target="a100", batch=64)).schedule == ratio.schedule


def test_optimize_reports_what_was_predicted(vit: nn.Module) -> None:
    fast = gtp_fx.optimize(vit, latency_budget=0.8, target="h100", batch=256, compile=False)
    before, after = fast.report.seconds or (0, 1)
    assert after <= 0.8 * before
    assert "predicted for 256 images" in in_one_line(str(fast.report))
    fast(images(ROW))


@pytest.mark.parametrize("name", [in_groups("planner", "vit"), in_groups("swin", "swin", nightly=True)])
@pytest.mark.parametrize("budget", [{"flops_budget": 0.8}, {"latency_budget": 0.85}])
def test_blocks_add_up_to_the_model(name: str, budget: dict[str, float], request: pytest.FixtureRequest) -> None:
    """FLOPs to the last one, as `optimize` asserts of the graph itself; seconds as the solver had them."""
    found = request.getfixturevalue(name).plan(Options.of(**budget, target="cpu"))
    fast = optimised(ROW if name == "planner" else SWIN, **budget, target="cpu")
    assert found.schedule == fast.schedule
    assert found.after.flops == fast.report.flops_after
    assert found.original.flops == fast.report.flops_before
    if fast.report.seconds is not None:
        assert (found.original.seconds, found.after.seconds) == pytest.approx(fast.report.seconds)
    assert sum(row.removed for row in found.blocks) == sum(fast.schedule)


def test_fewer_tokens_take_less_time(planner: Planner) -> None:
    taken = [planner.plan(Options.of(flops_budget=b, target="cpu")).after.seconds for b in (0.7, 0.5, 0.35)]
    assert taken == sorted(taken, reverse=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latency_budget": 1.5}, "0 < r <= 1"),
        ({"latency_budget": "fast"}, "'4.5ms'"),
        ({"latency_budget": "0ms"}, "'4.5ms'"),
        ({"latency_budget": True}, "0 < r <= 1"),
        ({"latency_budget": 0.7, "flops_budget": 0.7}, "give one of them"),
        ({"latency_budget": 0.7, "schedule": [8, 8, 8]}, "give one of them"),
        ({"latency_budget": 0.7, "batch": 0}, "at least 1"),
        ({"latency_budget": "1us", "target": "h100"}, "on target 'h100', 8 images, can't be reached"),
    ],
)
def test_budgets_of_time_that_do_not_fit(vit: nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises(gtp_fx.GtpError) as error:
        gtp_fx.optimize(vit, compile=False, **options)
    assert message in str(error.value)


def test_units() -> None:
    assert LatencyBudget.of("4.5ms").limit(1.0) == pytest.approx(4.5e-3)
    assert LatencyBudget.of(" 20 us").limit(1.0) == pytest.approx(20e-6)
    assert LatencyBudget.of(0.5).limit(3.0) == 1.5


@pytest.mark.nightly
def test_the_backend_takes_a_latency_budget(vit: nn.Module) -> None:
    from bench.dynamo_door import Door

    door = Door(latency_budget=0.8, target="h100", batch=256)
    torch._dynamo.reset()
    x = images(ROW)
    torch._dynamo.mark_dynamic(x, 0)  # a batch that Dynamo bakes in is the one that is priced
    torch.compile(vit, backend=door)(x)
    wanted = gtp_fx.optimize(vit, latency_budget=0.8, target="h100", batch=256, compile=False)
    assert door.made[0].schedule == wanted.schedule


@pytest.mark.nightly
def test_plan_prints_blocks_draws_and_saves(tmp_path: Path) -> None:
    picture, file = tmp_path / "tokens.png", tmp_path / "schedule.json"
    done = run(
        "plan", NAME, "--flops-budget", "0.7", "--target", "h100", "--plot", str(picture), "--save-schedule", str(file)
    )
    assert done.exit_code == 0, done.output
    assert "if time fell as FLOPs do" in done.stdout and "gain" in done.stdout
    assert "blocks.0.attn" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    schedule = gtp_fx.Schedule.from_json(file.read_text())
    import timm

    model = timm.create_model(NAME).eval()
    assert gtp_fx.optimize(model, schedule=schedule, compile=False).report.flops_ratio <= 0.7
    with pytest.raises(gtp_fx.ScheduleError, match="made for another model"):
        gtp_fx.optimize(build(ROW), schedule=schedule, compile=False)


@pytest.mark.nightly
def test_plan_compares_budgets_and_targets() -> None:
    done = run(
        "plan",
        NAME,
        "--flops-budget",
        "0.8",
        "--flops-budget",
        "0.6",
        "--target",
        "cpu",
        "--target",
        "a100",
        "--json",
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["plans"]
    assert [(p["target"], p["budget"]) for p in found] == [
        ("cpu", "flops_budget=0.8"),
        ("cpu", "flops_budget=0.6"),
        ("a100", "flops_budget=0.8"),
        ("a100", "flops_budget=0.6"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([NAME], "no budget"),
        ([NAME, "--flops-budget", "0.7", "--target", "tpu"], "'h200'"),
        (["no_such_model", "--flops-budget", "0.7"], "no model"),
        (
            [NAME, "--flops-budget", "0.7", "--flops-budget", "0.6", "--save-schedule", "x.json"],
            "--save-schedule keeps one",
        ),
        ([NAME, "--flops-budget", "0.7", "--save-schedule", "/nowhere/x.json"], "/nowhere/x.json"),
        ([NAME, "--flops-budget", "0.7", "--plot", "x.nothing"], "plot x.nothing"),
    ],
)
def test_plan_fails_with_a_sentence(arguments: list[str], message: str) -> None:
    done = run("plan", *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


@pytest.mark.nightly
def test_tune_keeps_what_it_measured(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "_compiled", probing._bound)
    done = run("tune", "--device", "cpu", "--rounds", "1", "--anyway")
    assert done.exit_code == 0, done.output
    assert "kept in" in done.stdout
    assert len(list(cache.rglob("cpu-*.json"))) == 1
    assert "measured 20" in run("plan", NAME, "--flops-budget", "0.8", "--target", "cpu").stdout


def test_a_graph_without_work_has_a_forecast() -> None:
    """A head that takes the class token alone, as timm's `forward_head(pre_logits=True)`: no gain, no division by 0."""
    none = BlockForecast(-1, "", 0, 0, 0, Cost(0, 0.0), Cost(0, 0.0))
    found = Forecast("no budget", "cpu", "", 8, "GTP()", "gtp", "", gtp_fx.Schedule((), ()), none.before, (none,))
    assert (found.flops_ratio, found.speed_up, found.share_of_limit, found.hint) == (1.0, 1.0, 1.0, "")
    assert "the same time; 1.000× if time fell" in str(found)
