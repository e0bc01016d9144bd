"""`gtp_fx.export`: an optimised model as a file, read back and held against the model before it is called done."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gtp_fx.capture.inputs import tensors_in
from gtp_fx.graph.torch_internals import load_aoti, package_aoti
from gtp_fx.graph.verify import rounding_tolerance
from gtp_fx.model.exporting.onnx import must_have_packages, run_onnx, write_onnx
from gtp_fx.model.exporting.program import ExportError, Program, program_of
from gtp_fx.model.optimized_model import OptimizedModel

FORMATS = {
    "torch": "a torch.export program, .pt2: torch.export.load(file).module()",
    "aoti": "an AOTInductor package, .pt2, compiled for the device the model is on: torch._inductor.aoti_load_package(file)",
    "onnx": "ONNX, .onnx: standard operators alone",
}
_SUFFIX = {"torch": ".pt2", "aoti": ".pt2", "onnx": ".onnx"}


@dataclass(frozen=True)
class Exported:
    """bytes: of the file (large ONNX models keep their weights in a second one beside it). error: how far its outputs are from the
    model's on noise, |file - model| / |model|; None where nothing here can run it, and unrun says why."""

    file: str
    format: str
    bytes: int
    error: float | None
    unrun: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    def __str__(self) -> str:
        checked = f"not run: {self.unrun}" if self.error is None else f"run, within {self.error:.1e} of the model"
        return f"{self.file}: {FORMATS[self.format]}\n{self.bytes / 2**20:.1f} MiB; {checked}"


def export(model: OptimizedModel, file: str | Path, format: str | None = None) -> Exported:
    """Write an optimised model in evaluation mode, for any batch, in plain ATen or ONNX: whoever reads it needs no gtp_fx.

    format: a name in `FORMATS`; by the file's suffix where None, and .pt2 is then "torch". An AOTInductor package is in ATen's
    operators on a GPU, too: gtp_fx's kernels stay with `torch.compile`.

    The file is read back and run. Raises ExportError where it can't be made or computes something else, and leaves no file then.
    """
    path, chosen = Path(file), format_of(file, format)
    made = program_of(model)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        draft = Path(scratch) / path.name
        _WRITE[chosen](made, draft)
        found = _RUN[chosen](draft, made)
        error = None if isinstance(found, str) else _error(found, made)
        for part in Path(scratch).iterdir():
            part.replace(path.parent / part.name)
    return Exported(str(path), chosen, path.stat().st_size, error, found if isinstance(found, str) else "")


def format_of(file: str | Path, format: str | None) -> str:
    """As `export` will have it, to be asked before the work. Raises ExportError where it can't write such a file."""
    path = Path(file)
    if format is None:
        format = {suffix: name for name, suffix in reversed(_SUFFIX.items())}.get(path.suffix)
        if format is None:
            raise ExportError(
                f"{path}: what its suffix stands for is unknown; give .pt2 or .onnx, or format= one of {', '.join(FORMATS)}"
            )
    if format not in FORMATS:
        told = "\n".join(f"  {name!r}: {meaning}" for name, meaning in FORMATS.items())
        raise ExportError(f"format={format!r} is unknown; give one of\n{told}")
    if path.suffix != _SUFFIX[format]:
        raise ExportError(f"{path}: a file of format {format!r} ends in {_SUFFIX[format]}")
    if not path.parent.is_dir():
        raise ExportError(f"{path}: {path.parent} is no directory; make it first")
    if format == "onnx":
        must_have_packages()
    return format


def _error(found: list[Tensor], made: Program) -> float:
    """The largest over outputs. Raises ExportError where it is more than rounding."""
    expected = made.results()
    if [tuple(a.shape) for a in found] != [tuple(b.shape) for b in expected]:
        raise ExportError(
            f"what was written gives {[tuple(a.shape) for a in found]}, the model {[tuple(b.shape) for b in expected]}"
        )
    worst = 0.0
    for got, want in zip(found, expected, strict=True):
        got, want = got.cpu().double(), want.cpu().double()
        worst = max(worst, float((got - want).norm() / want.norm().clamp_min(1e-30)))
    limit = rounding_tolerance(expected[0].dtype)
    if not worst <= limit or math.isnan(worst):
        raise ExportError(
            f"what was written is {worst:.2g} (relative) from the model on noise, more than rounding ({limit:.2g})"
        )
    return worst


def _write_torch(made: Program, file: Path) -> None:
    torch.export.save(made.program, file)


def _run_torch(file: Path, made: Program) -> list[Tensor]:
    with torch.no_grad():
        return tensors_in(torch.export.load(file).module()(*made.args, **made.kwargs))


def _write_aoti(made: Program, file: Path) -> None:
    with torch.no_grad():
        package_aoti(made.program, str(file))


def _run_aoti(file: Path, made: Program) -> list[Tensor]:
    return tensors_in(load_aoti(str(file))(*made.args, **made.kwargs))


_WRITE = {"torch": _write_torch, "aoti": _write_aoti, "onnx": write_onnx}
_RUN: dict[str, Callable[[Path, Program], list[Tensor] | str]] = {
    "torch": _run_torch,
    "aoti": _run_aoti,
    "onnx": run_onnx,
}
"""The outputs for the example, or why there are none."""
