"""`python -m bench.gpu_traffic` on a toy model: launches are the code's, bytes are counted as by hand, and groups add
up."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import typer
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

pytest.importorskip("triton")

from bench import gpu_traffic
from bench.generated_code import calls_in
from bench.gpu_time_model import GpuModel
from bench.gpu_work import Product, Scores, TokenGraph, Work, own_work
from bench.launches import GENERATED, Launch

from support.checkout import ROOT

pytestmark = pytest.mark.nightly

NET = gpu_traffic.DRY_NETS[0]
BATCH, TOKENS, CHANNELS, HALF, LEAVING = NET.batch, 37, 64, 2, 12


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The toy model's row, and the folder of its code. A process of its own: Triton's interpreter is on in this one,
    and what torch finds out about a GPU it keeps."""
    folder = tmp_path_factory.mktemp("traffic")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.gpu_traffic", "--dry-run", "--code", str(folder)]
    command += ["--out", str(folder / "x.json"), "--table", str(folder / "x.md")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    assert "modelled, not measured" in run.stdout and "modelled, not measured" in (folder / "x.md").read_text()
    (row,) = json.loads((folder / "x.json").read_text())["models"]
    return row, folder


def kernel(row: dict[str, Any], graph: str, part: str) -> dict[str, Any]:
    (found,) = [entry for entry in row["kernels"][graph] if part in entry["kernel"]]
    return dict(found)


def test_launches_are_what_the_code_says(made: tuple[dict[str, Any], Path]) -> None:
    row, folder = made
    counted = {}
    for graph in ("original", "bare", "optimised"):
        code = (folder / f"{NET.name}_b{BATCH}_{graph}.py").read_text()
        body = code[code.index("def call(self, args)") : code.index("runner = Runner")]
        counted[graph] = len(
            re.findall(r"^ +(?:\w+ = )?(?:\w+\.run|extern_kernels\.\w+|torch\.ops\.[\w.]+)\(", body, re.M)
        )
        assert row[graph]["launches"] == counted[graph]
    added = sum(group["launches"] for group in row["added"].values())
    assert added == counted["optimised"] - counted["bare"] > 0


def test_bytes_are_those_counted_by_hand(made: tuple[dict[str, Any], Path]) -> None:
    row, _ = made
    assert row["schedule"] == [LEAVING, 0]
    hidden = BATCH * TOKENS * 4 * CHANNELS * HALF
    gelu = kernel(row, "original", "gelu")
    assert gelu["launches"] == 2 and gelu["bytes"] == 2 * (hidden + hidden)
    tokens = BATCH * TOKENS * CHANNELS * HALF
    attention = kernel(row, "original", "scaled_dot_product")
    beside = BATCH * 2 * TOKENS * 4 + 2 * 8  # log-sum-exps, which have a place all the same, and a random state
    assert attention["launches"] == 2 and attention["bytes"] == 2 * (4 * tokens + beside)
    first = kernel(
        row, "original", "triton_per_fused_add_cat_convolution"
    )  # of the stream's start: its first two norms
    made_of = BATCH * (TOKENS - 1) * CHANNELS * HALF + (2 * CHANNELS + TOKENS * CHANNELS) * HALF  # CLS, bias, places
    norm = 2 * CHANNELS * HALF + tokens
    assert first["launches"] == 2 and first["bytes"] == (made_of + norm) + (made_of + norm + 2 * tokens)
    patches = TOKENS - 1
    select = kernel(row, "optimised", "select_kernel")  # scores; both lists of tokens and of cells; the map
    assert select["bytes"] == BATCH * (patches * 4 + 2 * patches * 8 + patches * 4)
    stays = BATCH * (TOKENS - LEAVING) * 4 * CHANNELS * HALF
    whole, last = 2 * stays, 2 * BATCH * 4 * CHANNELS * HALF  # the last block's is for CLS alone
    assert sum(x["bytes"] for x in row["kernels"]["optimised"] if "gelu" in x["kernel"]) == whole + last


def test_nothing_is_counted_twice(made: tuple[dict[str, Any], Path]) -> None:
    row, _ = made
    for what in ("launches", "bytes", "flops"):
        for graph in ("original", "bare", "optimised"):
            assert sum(entry[what] for entry in row["kernels"][graph]) == row[graph][what]
        assert sum(group[what] for group in row["added"].values()) == row["optimised"][what] - row["bare"][what]
    seconds = row["optimised"]["seconds"] - row["bare"]["seconds"]
    assert sum(group["seconds"] for group in row["added"].values()) == pytest.approx(seconds)
    groups = {entry["group"] for entry in row["kernels"]["optimised"]}
    assert groups >= {"graph", "scored", "select", "stream", "other"}
    assert row["added"]["other"]["flops"] == 0, "without GTP's operators it is as short"


def test_flops_are_torchs(made: tuple[dict[str, Any], Path]) -> None:
    row, _ = made
    with torch.device("meta"):
        model, images = timm.create_model(NET.name, **NET.made_with), torch.empty(BATCH, 3, NET.side, NET.side)
    with FlopCounterMode(display=False) as counter:
        model(images)
    assert row["original"]["flops"] == counter.get_total_flops()


def test_a_call_that_is_not_known_is_named() -> None:
    code = "class Runner:\n    def call(self, args):\n        triton_poi_0.run(args)\n        "
    assert calls_in(code + "extern_kernels.mm(args)") == ["triton_poi_0", "extern_kernels.mm"]
    with pytest.raises(NotImplementedError, match="mystery"):
        calls_in(code + "mystery(args)")


def test_modelled_time_is_of_bytes_or_of_whole_waves() -> None:
    model = GpuModel()
    moving = Launch("copy", GENERATED, "", 10**9, 10**9, Work())
    assert model.seconds(moving) == pytest.approx(model.launch + 2e9 / model.bandwidth)
    of = lambda tiles: model.computing(Product(1, 128 * tiles, 256, 4096, False))  # noqa: E731
    assert of(2 * 132) == pytest.approx(2 * of(132)) and of(132 + 100) == of(2 * 132)
    single = model.computing(Product(8, 196, 196, 384, True))
    assert single > 8 * model.computing(Product(8, 196, 196, 384, False))


def test_work_is_read_off_operands() -> None:
    q, tile = (4, 6, 197, 64), {"ROWS": 64, "COLUMNS": 32}
    tensors = {"q_ptr": q, "k_ptr": q, "lse_ptr": q[:3], "received_ptr": (4, 6, 196)}
    scores = own_work("scores", "scores_kernel", tensors, ["received_ptr"], tile)
    assert scores == Scores(24, 197, 197, 64, 64, 64, 32) and scores.flops == 2 * 24 * 197 * 197 * 64
    tensors = {"x_ptr": (4, 197, 384), "near_ptr": (4, 196, 8), "degree_ptr": (4, 196)}
    graph = own_work("token_graph", "token_graph_kernel", tensors, ["near_ptr", "degree_ptr"], tile)
    assert graph == TokenGraph(4, 196, 384, 8, 64, 32)
    for work in (scores, graph):
        assert GpuModel().computing(work) > 0
    with pytest.raises(NotImplementedError, match="mystery"):
        own_work("mystery", "kernel", {}, [], {})


@pytest.mark.parametrize(
    ("arguments", "interpreted", "told"), [((), "1", "unset it"), (("--model", "nothing"), "0", "give some of")]
)
def test_bad_calls_are_a_sentence(
    arguments: tuple[str, ...], interpreted: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    app = typer.Typer()
    app.command()(gpu_traffic.main)
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 2 and result.output.startswith("gpu_traffic: ") and told in result.output
