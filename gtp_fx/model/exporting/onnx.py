"""ONNX export by torch's dynamo exporter: standard operators alone, for any batch."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import torch

from gtp_fx.errors import ExportError
from gtp_fx.model.exporting.program import Program, required

_SLOW = ("ScatterElements", "ScatterND")
"""Operators that runtimes run slowly, or not at all, when they have a reduction."""


def must_have_packages() -> None:
    """Check that the packages for ONNX can be imported. Raises ExportError where one can't."""
    for package in ("onnx", "onnxscript"):
        required(package, "ONNX", "onnx onnxscript onnxruntime")


def write_onnx(made: Program, file: Path) -> None:
    """Write a program as ONNX.

    Raises ExportError where a package is missing, or where an operator has no counterpart among ONNX's standard ones.
    """
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
    # The exporter may fall back on operators of its own domain, which runtimes lack.
    graph = written.model.graph
    foreign = {f"{node.domain}::{node.op_type}" for node in graph if node.domain not in ("", "ai.onnx")}
    foreign |= {node.op_type for node in graph if node.op_type in _SLOW and _reduces(node)}
    if foreign:
        raise ExportError(
            f"ONNX: torch's exporter wrote {', '.join(sorted(foreign))}, which runtimes lack or run slowly"
        )
    _name_batch(written.model, made.program)
    written.save(str(file))


def run_onnx(file: Path, made: Program) -> list[torch.Tensor] | str:
    """Run a file in onnxruntime on the CPU, on the program's example; return the outputs.

    Returns the reason instead where onnxruntime isn't installed or lacks kernels for the model's dtype.
    """
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError:
        return "onnxruntime isn't installed"
    if low := {value.dtype for value in made.tensors() if value.dtype in (torch.bfloat16, torch.float16)}:
        return f"onnxruntime lacks some kernels for {', '.join(map(str, low))} on the CPU"
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    takes = [value.name for value in session.get_inputs()]
    given = dict(zip(made.names()[0], made.tensors(), strict=True))
    found = session.run(None, {name: given[name].cpu().numpy() for name in takes})
    return [torch.from_numpy(value) for value in found]


def _stable_sort() -> Any:
    """Return a translation of aten.sort.stable, which torch's exporter lacks.

    It is TopK over all entries, which ONNX defines as stable: among equal entries the first comes first.
    """
    op = importlib.import_module("onnxscript").opset18

    def sort(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        size = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]))
        return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)

    return sort


def _reduces(node: Any) -> bool:
    """Tell whether an ONNX node has a reduction."""
    reduction = node.attributes.get("reduction")
    return reduction is not None and reduction.value not in ("none", b"none")


def _name_batch(model: Any, program: torch.export.ExportedProgram) -> None:
    """Rename the open dimension, which torch calls "s77" or the like and every viewer shows, to "batch"."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        for side, size in enumerate(value.shape or ()):
            if str(size) in map(str, program.range_constraints):
                value.shape[side] = "batch"


def _cause(error: BaseException) -> str:
    """Return the innermost cause in one line; the exporter's own message begins with advice on reporting it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return inspect.cleandoc(str(error)).splitlines()[0]
