"""bench.imagenet on a small set that the test makes: right counts, the same by two processes, resumed, from shards."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.data
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

import gtp_fx
from bench import imagenet
from gtp_fx.cli.weights import load_model
from gtp_fx.measure.evaluation.record import Record
from gtp_fx.plan.damage.divergence import divergence

pytestmark = pytest.mark.nightly

MODEL = "test_vit"
CLASSES = ("apple", "bread", "cloud", "dune")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is kept from one case to the next."""
    monkeypatch.setenv("GTP_FX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images a class, each class another colour under noise."""
    root = tmp_path_factory.mktemp("val")
    generator = torch.Generator().manual_seed(0)
    for number, name in enumerate(CLASSES):
        (root / name).mkdir()
        for i in range(6):
            colour = torch.tensor([60.0 * number, 240 - 60.0 * number, 40.0 * i])
            pixels = colour + 40 * torch.randn(40, 48, 3, generator=generator)
            Image.fromarray(pixels.clamp(0, 255).byte().numpy()).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def labels(data: Path) -> Path:
    """A class map that gives the folders classes which the untrained model says, or there would be nothing to count."""
    model, transform = load_model(MODEL).model, _transform()
    order = [f"other{i}" for i in range(1000)]
    for name in CLASSES:
        images = torch.stack([transform(Image.open(file)) for file in sorted((data / name).iterdir())])
        best = model(images).detach().mean(0).argsort(descending=True)
        place = next(int(i) for i in best if order[int(i)].startswith("other"))
        order[place] = name
    file = data.parent / "classes.txt"
    file.write_text("\n".join(order))
    return file


def _transform() -> Any:
    return timm.data.create_transform(**timm.data.resolve_model_data_config(load_model(MODEL).model), is_training=False)


def arguments(data: Path, labels: Path | None, out: Path, *more: str) -> list[str]:
    given = [
        "--model",
        MODEL,
        "--data",
        str(data),
        "--flops-budget",
        "0.7",
        *([] if labels is None else ["--class-map", str(labels)]),
        "--out",
        str(out),
    ]
    return [*given, "--batch", "5", "--workers", "0", "--dtype", "float32", "--device", "cpu", "--no-compile", *more]


def run(*args: Any) -> dict[str, Any]:
    app = typer.Typer()
    app.command()(imagenet.main)
    out = args[2]
    done = CliRunner().invoke(app, arguments(*args), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return dict(json.loads(out.read_text()))


@torch.no_grad()
def test_counts_are_those_by_hand(data: Path, labels: Path, tmp_path: Path) -> None:
    names, transform, model = labels.read_text().split(), _transform(), load_model(MODEL).model
    fast = gtp_fx.optimize(model, flops_budget=0.7, compile=False)
    original_1 = optimised_1 = optimised_5 = same = 0
    for folder in CLASSES:
        for file in sorted((data / folder).iterdir()):
            x = transform(Image.open(file))[None]
            before, after = model(x)[0], fast(x)[0]
            label = names.index(folder)
            original_1 += int(before.argmax()) == label
            optimised_1 += int(after.argmax()) == label
            optimised_5 += label in after.topk(5).indices.tolist()
            same += int(before.argmax()) == int(after.argmax())
    counts = run(data, labels, tmp_path / "a.json")["counts"]
    assert counts["images"] == 24 and 0 < original_1 < 24
    assert (counts["original_1"], counts["optimised_1"]) == (original_1, optimised_1)
    assert (counts["optimised_5"], counts["same"]) == (optimised_5, same)
    assert counts["original_1"] - counts["lost"] + counts["won"] == counts["optimised_1"]


@torch.no_grad()
def test_without_labels_agreement_is_counted_and_the_original_runs_once(data: Path, tmp_path: Path) -> None:
    """On a folder of images alone; and what is found of the base is kept for the next strategy."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for folder in CLASSES:
        for file in (data / folder).iterdir():
            (flat / f"{folder}{file.name}").write_bytes(file.read_bytes())
    app, out = typer.Typer(), tmp_path / "a.json"
    app.command()(imagenet.main)
    given = [word for word in arguments(flat, tmp_path, out) if word not in ("--class-map", str(tmp_path))]
    refused = CliRunner().invoke(app, given)
    assert refused.exit_code == 2 and "has no class folders; --agreement-only needs none" in refused.output
    found = []
    for strategy in ("regeneration", "tome", "tome"):
        done = CliRunner().invoke(app, [*given, "--agreement-only", "--strategy", strategy], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        found.append(json.loads(out.read_text()))
    assert [result["images_per_second"]["original"] is None for result in found] == [False, True, True]
    assert found[1]["estimates"] == found[2]["estimates"] != found[0]["estimates"]
    transform, model = _transform(), load_model(MODEL).model
    x = torch.stack([transform(Image.open(file)) for file in sorted(flat.iterdir())])
    before, after = model(x), gtp_fx.optimize(model, flops_budget=0.7, strategy="tome", compile=False)(x)
    same = found[1]["estimates"]["same"]
    assert found[1]["counts"] == {"images": 24, "same": int((before.argmax(1) == after.argmax(1)).sum())}
    assert same["low"] < same["value"] <= same["high"] and "original_1" not in found[1]["estimates"]
    moved = found[1]["estimates"]["divergence"]
    assert moved["value"] == pytest.approx(divergence(after, before), rel=1e-3) and moved["low"] < moved["high"]


def test_two_processes_find_the_same(data: Path, labels: Path, tmp_path: Path) -> None:
    alone = run(data, labels, tmp_path / "one.json")
    state = tmp_path / "state"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "bench.imagenet",
    ]
    command += arguments(data, labels, tmp_path / "two.json", "--state", str(state))
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    together = json.loads((tmp_path / "two.json").read_text())
    assert together["counts"] == alone["counts"] and together["processes"] == 2
    places = [
        {row[0] for line in file.read_text().splitlines()[1:] for row in json.loads(line)}
        for file in tmp_path.glob("state.rank*")
    ]
    assert len(places) == 2 and not places[0] & places[1] and len(places[0] | places[1]) == 24


def test_a_run_that_was_cut_off_goes_on(
    data: Path, labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the record is lost, its last line in the middle; only what is missing is evaluated."""
    state = tmp_path / "state"
    whole = run(data, labels, tmp_path / "a.json", "--state", str(state))
    file = tmp_path / "state.rank0"
    lines = file.read_text().splitlines()
    assert len(lines) == 1 + 5
    file.write_text("\n".join(lines[:3]) + "\n" + lines[3][:20] + "\n")
    seen: list[int] = []
    monkeypatch.setattr(Record, "add", _counting(Record.add, seen))
    again = run(data, labels, tmp_path / "b.json", "--state", str(state))
    assert again["counts"] == whole["counts"] and sum(seen) == 24 - 10
    run(data, labels, tmp_path / "c.json", "--state", str(state))
    assert sum(seen) == 24 - 10, "nothing is left to do"


def _counting(add: Any, seen: list[int]) -> Any:
    def counted(record: Record, batch: Any) -> None:
        rows = list(batch)
        seen.append(len(rows))
        add(record, rows)

    return counted


def test_shards_are_the_folder(data: Path, labels: Path, tmp_path: Path) -> None:
    shards, names = tmp_path / "shards", labels.read_text().split()
    shards.mkdir()
    files = [(file, names.index(folder)) for folder in CLASSES for file in sorted((data / folder).iterdir())]
    for number in range(2):
        with tarfile.open(shards / f"{number:06}.tar", "w") as archive:
            for file, label in files[12 * number : 12 * number + 12]:
                key = f"{file.parent.name}_{file.stem}"
                for name, content in ((f"{key}.png", file.read_bytes()), (f"{key}.cls", str(label).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    assert run(shards, None, tmp_path / "b.json")["counts"] == run(data, labels, tmp_path / "a.json")["counts"]
