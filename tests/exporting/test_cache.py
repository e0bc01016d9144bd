"""Compiled code as a file: another process compiles nothing, and what isn't for it is refused."""

from __future__ import annotations

import json
import os
import pickle
import pickletools
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import gtp_fx
from gtp_fx.graph.torch_internals import name_memory_formats
from gtp_fx.model.exporting import cache

from support.checkout import ROOT
from support.plain_vit import PlainViT, built, images
from support.small_models import small

EXPORTS = """
import json, sys
import timm, torch
import gtp_fx
file, folder = sys.argv[1:]
torch.compile(lambda x: x.sin() + 1)(torch.ones(8))  # what torch has asked of the processor by then isn't in the file
written = gtp_fx.export(gtp_fx.load(folder, timm.create_model("test_vit", depth=1).eval()), file)
print(json.dumps([written.format, written.error]))
"""

LOADS = """
import json, sys
from pathlib import Path
import timm, torch
import gtp_fx
from gtp_fx.graph.torch_internals import cache_misses, compiler_cache
file, folder = sys.argv[1:]

def libraries():  # but for those by which torch asks what the processor can do
    found = compiler_cache().rglob("*.so")
    return {so for so in found if "_chk_kernel" not in (so.with_suffix(".cpp")).read_text()}

gtp_fx.load_cache(file)
there = libraries()
fast = gtp_fx.load(folder, timm.create_model("test_vit", depth=1).eval(), compile=True)
with torch.inference_mode():
    fast.warm_up((1, 4))
    found = fast(torch.linspace(-1, 1, 3 * 3 * 160 * 160).view(3, 3, 160, 160))
print(json.dumps([cache_misses(), len(libraries() - there), len(there), found.tolist()]))
"""


@pytest.mark.nightly
def test_another_process_compiles_nothing(tmp_path: Path) -> None:
    """Both are processes of their own: what other tests have set or imported may be part of torch's keys."""
    fast = small(depth=1)
    fast.save_pretrained(tmp_path / "saved")

    def printed(code: str) -> Any:
        there = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "empty")}
        command = (sys.executable, "-c", code, str(tmp_path / "small.cache"), str(tmp_path / "saved"))
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=there)
        assert done.returncode == 0, done.stderr
        shutil.rmtree(tmp_path / "empty", ignore_errors=True)
        return json.loads(done.stdout.splitlines()[-1])

    kind, error = printed(EXPORTS)
    assert kind == "cache" and error < 1e-5
    missed, compiled, libraries, found = printed(LOADS)
    assert (missed, compiled) == (0, 0) and libraries > 0
    wanted = fast(torch.linspace(-1, 1, 3 * 3 * 160 * 160).view(3, 3, 160, 160))
    torch.testing.assert_close(torch.tensor(found), wanted, rtol=1e-3, atol=1e-4)


def test_what_is_compiled_for_others_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.cache"
    file.write_text("no archive")
    with pytest.raises(gtp_fx.LoadError, match="can't be read as compiled code"):
        gtp_fx.load_cache(file)
    here = cache._about(torch.device("cpu"))
    for name, other in (("torch", "2.0"), ("processor", "another, AVX512, 96 threads"), ("version", 0)):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("about.json", json.dumps({**here, name: other}))
            archive.writestr("artifacts", b"")
        with pytest.raises(gtp_fx.LoadError, match=f"{name} .*{other}.*export it anew"):
            gtp_fx.load_cache(file)


def test_memory_formats_are_pickled_by_name_and_not_by_a_module_that_imported_torch() -> None:
    """Torch's keys of compiled code hold one: this file has `torch`, too, and would be named by pickle."""
    name_memory_formats()
    for memory_format in (torch.contiguous_format, torch.channels_last, torch.preserve_format):
        pickled = pickle.dumps(memory_format)
        assert pickle.loads(pickled) is memory_format
        named = {text for _, text, _ in pickletools.genops(pickled) if isinstance(text, str)}
        assert named == {"pkgutil", "resolve_name", str(memory_format).replace(".", ":")}


@torch.no_grad()
def test_a_twin_that_compiles_has_the_schedule_and_parameters_and_the_model_stays_as_it_is() -> None:
    model = gtp_fx.optimize(built(PlainViT), flops_budget=0.8, example_inputs=images(), compile=False)
    before = model(images(3))
    twin = cache.compiling(model)
    assert twin._gtp.compiles and not model._gtp.compiles
    assert twin.schedule == model.schedule and twin.head.weight is model.head.weight
    assert torch.equal(twin.graph_module(images(3)), before) and torch.equal(model(images(3)), before)
