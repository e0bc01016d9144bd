"""ONNX, by torch's dynamo exporter: standard operators alone, and any batch."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import torch

from gtp_fx.model.exporting.program import ExportError, Program, required

_SLOW = ("ScatterElements", "ScatterND")
"""With a reduction: runtimes do them slowly, or not at all."""


def must_have_packages() -> None:
    """Raises ExportError where one is missing."""
    for package in ("onnx", "onnxscript"):
        required(package, "ONNX", "onnx onnxscript onnxruntime")


def write_onnx(made: Program, file: Path) -> None:
    """Raises ExportError where a package is missing, or an operator of the model has no counterpart in ONNX."""
    must_have_packages()
    inputs, outputs = made.names()
    try:
        written: Any = torch.onnx.export(
            made.program,
            made.args,
            kwargs=made.kwargs,
            dynamo=True,
            verbose=False,
            input_names=inputs,
            output_names=outputs,
            custom_translation_table={torch.ops.aten.sort.stable: _stable_sort()},
        )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"ONNX: {_cause(error)}; the other formats write any operator of ATen") from error
    graph = written.model.graph
    foreign = {f"{node.domain}::{node.op_type}" for node in graph if node.domain not in ("", "ai.onnx")}
    foreign |= {node.op_type for node in graph if node.op_type in _SLOW and _reduces(node)}
    if foreign:
        raise ExportError(
            f"ONNX: torch's exporter made {', '.join(sorted(foreign))}, which runtimes don't have or do slowly"
        )
    _name_batch(written.model, made.program)
    written.save(str(file))


def run_onnx(file: Path, made: Program) -> list[torch.Tensor] | str:
    """The outputs for `made`'s example, by onnxruntime on the CPU; why not where it isn't installed or lacks the model's dtype."""
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError:
        return "onnxruntime isn't installed"
    if low := {value.dtype for value in made.tensors() if value.dtype in (torch.bfloat16, torch.float16)}:
        return f"onnxruntime has no whole set of kernels for {', '.join(map(str, low))} on the CPU"
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    takes = [value.name for value in session.get_inputs()]
    given = dict(zip(made.names()[0], made.tensors(), strict=True))
    found = session.run(None, {name: given[name].cpu().numpy() for name in takes})
    return [torch.from_numpy(value) for value in found]


def _stable_sort() -> Any:
    """aten.sort.stable, which torch's exporter doesn't know. ONNX's TopK is stable: of equal entries the first comes first."""
    op = importlib.import_module("onnxscript").opset18

    def sort(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        size = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]))
        return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)

    return sort


def _reduces(node: Any) -> bool:
    reduction = node.attributes.get("reduction")
    return reduction is not None and reduction.value not in ("none", b"none")


def _name_batch(model: Any, program: torch.export.ExportedProgram) -> None:
    """torch calls the open side "s77"; a person reads it in every viewer."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        for side, size in enumerate(value.shape or ()):
            if str(size) in map(str, program.range_constraints):
                value.shape[side] = "batch"


def _cause(error: BaseException) -> str:
    """The innermost reason, in a line: the exporter's own message begins with advice on how to report it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return inspect.cleandoc(str(error)).splitlines()[0]
