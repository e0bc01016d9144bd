"""torch.compile(…, backend="gtp").aot_compile: a process without gtp_fx runs what another one compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import gtp_fx
from gtp_fx.errors import OptionError

from support.zoo import enliven

X = torch.linspace(-1, 1, 3 * 3 * 96 * 96).view(3, 3, 96, 96)
BUILT = {"depth": 1, "global_pool": "avg", "img_size": 96, "num_classes": 10}
SCHEDULE = [9]
LOADS = f"""
import sys
import timm, torch
folder = sys.argv[1]
model = timm.create_model("test_vit", **{BUILT}).eval()
model.load_state_dict(torch.load(folder + "/weights"))
with open(folder + "/ahead", "rb") as opened, torch.no_grad():
    run = torch.compiler.load_compiled_function(opened)
    torch.save(run(model, torch.linspace(-1, 1, 3 * 3 * 96 * 96).view(3, 3, 96, 96)), folder + "/found")
assert "gtp_fx" not in sys.modules
"""


def compiled_ahead(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    given = {"schedule": SCHEDULE, **options}
    with torch.no_grad():
        ahead: Any = torch.compile(model.forward, backend="gtp", options=given, fullgraph=True)
        return ahead.aot_compile(((X,), {}))


def tiny() -> nn.Module:
    return enliven(timm.create_model("test_vit", **BUILT)).eval()


@pytest.mark.nightly
@pytest.mark.skipif(torch.__version__ < "2.14", reason="before, torch writes what its own backends compile alone")
def test_a_process_without_gtp_fx_runs_the_file(tmp_path: Path) -> None:
    model = tiny()
    compiled_ahead(model).save_compiled_function(str(tmp_path / "ahead"))
    torch.save(model.state_dict(), tmp_path / "weights")
    command = (sys.executable, "-c", LOADS, str(tmp_path))
    there = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=there, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        wanted = gtp_fx.optimize(model, schedule=SCHEDULE, example_inputs=X, compile=False)(X)
        assert (model(X) - wanted).abs().max() > 1e-2, "tokens are removed"
    torch.testing.assert_close(torch.load(tmp_path / "found"), wanted, rtol=1e-4, atol=1e-4)


def test_code_that_calls_share_is_not_compiled_ahead_of_them() -> None:
    with pytest.raises(OptionError, match=r"shapes='shared'.*give 'static'"):
        compiled_ahead(tiny(), shapes="shared")
