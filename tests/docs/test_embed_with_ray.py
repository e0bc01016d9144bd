"""The example on Ray: two actors give what one process gives, once for each picture, also where a run continues one."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gtp_fx
from gtp_fx.cli.models import load_named
from gtp_fx.cli.photo import load_photo, prepared

from support.checkout import ROOT

pytestmark = pytest.mark.nightly
ray_data = pytest.importorskip("ray.data")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

FILE = ROOT / "examples" / "embed_with_ray.py"
OPTIONS = ("--model", "test_vit", "--eager", "--workers", "2", "--batch", "3")
RUN = """
import ray, runpy, sys
ray.init(num_cpus=4, include_dashboard=False)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_example(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys\nsys.argv = [{str(FILE)!r}, *sys.argv[1:]]\n{RUN}"
    there = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = (sys.executable, "-c", code, *arguments, *OPTIONS)
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=there)


def rows_in(out: Path, name: str) -> dict[str, Any]:
    found = parquet.read_table(out / "parts").to_pylist()
    assert len({row[name] for row in found}) == len(found), "each once"
    return {Path(row[name]).name: row for row in found}


def test_a_folder_is_embedded_once_and_a_table_gives_the_same(tmp_path: Path) -> None:
    pictures = {f"{number}.png": load_photo().resize((200 + number, 180)).rotate(30 * number) for number in range(8)}
    folder, out = tmp_path / "pictures", tmp_path / "out"
    (folder / "deeper").mkdir(parents=True)
    for name, picture in list(pictures.items())[:6]:
        picture.save(folder / "deeper" / name)
    (folder / "broken.png").write_text("no picture")
    told = run_example(str(folder), str(out))
    assert told.returncode == 0 and "7 rows in" in told.stdout and "1 of them unreadable" in told.stdout, told.stderr
    first = {file: file.stat().st_mtime_ns for file in (out / "parts").iterdir()}

    for name, picture in list(pictures.items())[6:]:
        picture.save(folder / name)
    told = run_example(str(folder), str(out))
    assert told.returncode == 0 and "9 rows in" in told.stdout, told.stderr
    assert {file: file.stat().st_mtime_ns for file in first} == first, "what is there isn't written again"
    rows = rows_in(out, "path")
    assert rows["broken.png"]["embedding"] is None and "UnidentifiedImageError" in rows["broken.png"]["error"]

    encoded = []
    for picture in pictures.values():
        file = io.BytesIO()
        picture.save(file, "PNG")
        encoded.append({"bytes": file.getvalue(), "path": ""})
    parquet.write_table(pyarrow.table({"key": list(pictures), "image": encoded}), tmp_path / "table.parquet")
    told = run_example(str(tmp_path / "table.parquet"), str(tmp_path / "of_table"), "--image", "image", "--id", "key")
    assert told.returncode == 0 and "8 rows in" in told.stdout, told.stderr
    others = rows_in(tmp_path / "of_table", "key")

    model = load_named("test_vit").model
    fast = gtp_fx.optimize(model.reset_classifier(0) or model, flops_budget=0.74, compile=False)
    with torch.no_grad():
        wanted = fast(torch.cat([prepared(fast, picture) for picture in pictures.values()]))
    for name, row in zip(pictures, wanted, strict=True):
        for found in (rows[name], others[name]):
            assert found["error"] == ""
            # Products of other batches are summed in another order.
            torch.testing.assert_close(torch.tensor(found["embedding"]), row, rtol=1e-4, atol=1e-5)

    told = run_example(str(folder), str(out), "--flops-budget", "0.8")
    assert told.returncode == 2 and "give another folder" in told.stderr.replace("\n", " ")
