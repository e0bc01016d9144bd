"""Files that others read: any batch, plain operators, the optimised model's numbers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import gtp_fx
from gtp_fx.model import exporting
from gtp_fx.model.exporting import files
from gtp_fx.strategies import STRATEGIES

from support import hf_models
from support.zoo import enliven, in_groups

NAME = "test_vit"  # timm's own for tests: 100 patches


def small(depth: int = 3, **options: Any) -> gtp_fx.OptimizedModel:
    model = enliven(timm.create_model(NAME, depth=depth)).eval()
    return gtp_fx.optimize(model, compile=False, **{"flops_budget": 0.7, **options})


def batches(fast: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of one image, which many servers send, and of more than the graph was captured with."""
    pairs = []
    for count in (1, 5):
        x = torch.randn(count, 3, 160, 160, generator=torch.Generator().manual_seed(count))
        pairs.append((x, fast(x)))
    return pairs


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.detach().abs().max()))


@pytest.mark.parametrize(
    "strategy",
    [
        in_groups(name, f"export {name}", nightly=name != "gtp")
        for name, cls in STRATEGIES.items()
        if cls.__module__.startswith("gtp_fx.")
    ],
)
def test_every_strategy_is_written_out_in_aten(strategy: str) -> None:
    fast = small(depth=6, strategy=strategy, flops_budget=0.8)
    assert any("gtp_fx" in str(node.target) for node in fast.graph_module.graph.nodes)
    program = gtp_fx.exported_program(fast)
    assert not any("gtp_fx" in str(node.target) for node in program.graph.nodes)
    assert [name for name, _ in program.named_parameters()] == [name for name, _ in fast.named_parameters()]
    for x, wanted in batches(fast):
        close(program.module()(x), wanted)


def test_progress_is_shown_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[bool] = []
    bar = files.progress_bar

    def asked_for(shown: bool) -> Any:
        asked.append(shown)
        return bar(shown)

    monkeypatch.setattr(files, "progress_bar", asked_for)
    monkeypatch.setattr(files, "program_of", lambda model: model)
    monkeypatch.setattr(files, "_written", lambda made, path, chosen, steps: (chosen, steps.label, steps.finished))
    model: Any = None
    assert gtp_fx.export(model, tmp_path / "x.pt2") == ("torch", "tracing, for any batch", 1)
    gtp_fx.export(model, tmp_path / "x.pt2", progress=True)
    assert asked == [False, True] and not gtp_fx.Calibration(None).progress
    assert capfd.readouterr().err == ""  # which is no terminal


def test_a_program_is_saved_and_loaded(tmp_path: Path) -> None:
    fast = small(depth=2, flops_budget=None, schedule=[30, 0])
    written = gtp_fx.export(fast, tmp_path / "small.pt2")
    assert written.format == "torch" and written.error == 0 and written.bytes > 1e5
    loaded = torch.export.load(tmp_path / "small.pt2").module()
    for x, wanted in batches(fast):
        close(loaded(x), wanted)


@pytest.mark.nightly
def test_an_aotinductor_package_runs(tmp_path: Path) -> None:
    fast = small(depth=2, flops_budget=None, schedule=[30, 0])
    written = gtp_fx.export(fast, tmp_path / "small.pt2", "aoti")
    assert written.error is not None and written.error < 1e-4
    loaded: Any = torch._inductor.aoti_load_package(str(tmp_path / "small.pt2"))
    for x, wanted in batches(fast):
        close(loaded(x), wanted)


@pytest.mark.nightly
def test_onnx_runs_in_onnxruntime(tmp_path: Path) -> None:
    """Standard operators, none that reduces while it scatters, and ties in the scores broken as torch does."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    fast = small()
    written = gtp_fx.export(fast, tmp_path / "small.onnx")
    assert written.error is not None and written.error < 1e-4
    model = onnx.load(tmp_path / "small.onnx")
    assert {node.domain for node in model.graph.node} == {""}
    assert not any(
        attribute.name == "reduction"
        for node in model.graph.node
        if "Scatter" in node.op_type
        for attribute in node.attribute
    )
    session = runtime.InferenceSession(str(tmp_path / "small.onnx"))
    assert [(value.name, value.shape) for value in session.get_inputs()] == [("x", ["batch", 3, 160, 160])]
    assert [value.name for value in session.get_outputs()] == ["output"]
    for x, wanted in [*batches(fast), (torch.zeros(2, 3, 160, 160), fast(torch.zeros(2, 3, 160, 160)))]:
        close(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), wanted)


@pytest.mark.nightly
def test_hugging_faces_outputs_keep_their_names(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    fast = gtp_fx.optimize(hf_models.build("clip"), flops_budget=0.7, compile=False)
    gtp_fx.export(fast, tmp_path / "clip.onnx")
    session = runtime.InferenceSession(str(tmp_path / "clip.onnx"))
    assert [value.name for value in session.get_inputs()] == ["pixel_values"]
    assert [value.name for value in session.get_outputs()] == ["image_embeds", "last_hidden_state"]
    given = hf_models.inputs("clip", batch=3)
    found = session.run(None, {"pixel_values": given["pixel_values"].numpy()})
    for value, wanted in zip(found, fast(**given).to_tuple(), strict=True):
        close(torch.from_numpy(value), wanted)


def test_files_that_nothing_writes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(gtp_fx.ExportError, match=r"what gtp_fx\.optimize returned, and got a Linear"):
        gtp_fx.export(nn.Linear(2, 2), tmp_path / "x.pt2")  # type: ignore[arg-type]
    fast = small()
    with pytest.raises(gtp_fx.ExportError, match=r"give \.pt2, \.onnx or \.cache"):
        gtp_fx.export(fast, tmp_path / "x.torchscript")
    with pytest.raises(gtp_fx.ExportError, match=r"ends in \.pt2"):
        gtp_fx.export(fast, tmp_path / "x.onnx", "aoti")
    with pytest.raises(gtp_fx.ExportError, match="format='tflite' is unknown"):
        gtp_fx.export(fast, tmp_path / "x.pt2", "tflite")
    with pytest.raises(gtp_fx.ExportError, match="is no directory"):
        gtp_fx.export(fast, tmp_path / "no" / "x.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.nightly
def test_what_cant_be_exported_is_refused_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = small()
    with torch.device("meta"):
        bare = gtp_fx.optimize(timm.create_model(NAME).eval(), flops_budget=0.7, compile=False)
    with pytest.raises(gtp_fx.ExportError, match="no weights to export"):
        gtp_fx.export(bare, tmp_path / "x.pt2")
    monkeypatch.setitem(exporting.files._RUN, "torch", lambda file, made: [made.results()[0] * 1.01])
    with pytest.raises(gtp_fx.ExportError, match="more than rounding"):
        gtp_fx.export(fast, tmp_path / "x.pt2")
    assert list(tmp_path.iterdir()) == []


def test_without_its_packages_onnx_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(gtp_fx.ExportError, match=r"ONNX needs onnx,.*pip install onnx onnxscript onnxruntime"):
        gtp_fx.export(small(), tmp_path / "x.onnx")
