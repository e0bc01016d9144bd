"""What a person gets who looks inside: logs, graphs behind each pass, passes left out, lines of the model's source."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import gtp_fx

from support import hf_models
from support.zoo import enliven

NAME = "test_vit"


def model() -> nn.Module:
    return enliven(timm.create_model(NAME)).eval()


@pytest.mark.nightly
def test_every_graph_is_written_on_request(tmp_path: Path) -> None:
    fast = gtp_fx.optimize(model(), flops_budget=0.7, compile=False, dump_graphs=str(tmp_path / "graphs"))
    pages = sorted(file.name for file in (tmp_path / "graphs" / "graph_0").glob("*.py"))
    names = [step.name for step in fast.report.passes]
    assert pages == [f"{number:02d}_{name}.py" for number, name in enumerate(["captured", *names])]
    last = (tmp_path / "graphs" / "graph_0" / pages[-1]).read_text()
    assert "gtp_fx.group" in last and "gtp_fx.group" not in (tmp_path / "graphs" / "graph_0" / pages[-2]).read_text()
    assert json.loads((tmp_path / "graphs" / "graph_0" / "schedule.txt").read_text())["removed"] == list(fast.schedule)
    gtp_fx.optimize(model(), flops_budget=1.0, compile=False, dump_graphs=str(tmp_path / "graphs"))
    assert (tmp_path / "graphs" / "graph_1" / "report.txt").exists()


def test_a_pass_can_be_left_out_by_name() -> None:
    x = hf_models.inputs("vit")
    whole = gtp_fx.optimize(hf_models.build("vit"), flops_budget=1.0, compile=False)
    without = gtp_fx.optimize(
        hf_models.build("vit"),
        flops_budget=1.0,
        compile=False,
        disabled_passes=["fuse_projections", "drop_dead_tokens"],
    )
    names = [step.name for step in whole.report.passes]
    assert [step.name for step in without.report.passes] == [
        n for n in names if n not in ("fuse_projections", "drop_dead_tokens")
    ]
    assert without.report.flops_ratio == 1.0 > whole.report.flops_ratio
    torch.testing.assert_close(without(**x).logits, whole(**x).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(gtp_fx.OptionError, match=r"disabled_passes=\['remove_tokens'\].*fuse_projections"):
        gtp_fx.optimize(model(), flops_budget=0.7, disabled_passes=["remove_tokens"])


def test_the_log_tells_what_each_pass_did(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="gtp_fx"):
        gtp_fx.optimize(model(), flops_budget=0.7, compile=False, disabled_passes=["fuse_projections"])
    assert "remove_tokens: added" in caplog.text and "gtp_fx.group.default" in caplog.text
    assert "fuse_projections: disabled" in caplog.text
    assert "of the FLOPs" in caplog.text and "leave" in caplog.text


@pytest.mark.nightly
def test_torchs_own_switches_reach_it(tmp_path: Path) -> None:
    """In a process of its own: TORCH_LOGS is read when torch is imported, from a checkout as from a wheel."""
    code = f"import timm, gtp_fx; gtp_fx.optimize(timm.create_model('{NAME}').eval(), flops_budget=0.7, compile=False)"
    environment = {**os.environ, "TORCH_LOGS": "+gtp_fx", "TORCH_TRACE": str(tmp_path)}
    done = subprocess.run((sys.executable, "-c", code), env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "remove_tokens (approximate)" in done.stderr and "remove_tokens: added" in done.stderr
    (trace,) = tmp_path.glob("*.log")
    found = [line for line in trace.read_text().splitlines() if '"gtp_fx_' in line]
    assert any("gtp_fx_00_captured" in line for line in found) and any("gtp_fx_schedule" in line for line in found)


def test_a_refusal_names_the_line_of_the_models_source() -> None:
    fast = gtp_fx.optimize(model(), flops_budget=0.7, compile=False)
    (dead,) = fast.report.refusals
    assert dead.source.startswith("timm/layers/attention.py:")
    assert str(dead).endswith(f"[{dead.source}]")


class Undecided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vit = model()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # a graph has one course
            x = x * 2
        return self.vit(x)  # type: ignore[no-any-return]


def test_a_model_that_cant_be_captured_is_told_where() -> None:
    with pytest.raises(gtp_fx.CaptureError, match=r"test_debugging\.py:\d+: if x\.sum\(\) > 0"):
        gtp_fx.optimize(Undecided(), flops_budget=0.7, example_inputs=torch.randn(2, 3, 160, 160))
