"""Files for `gtp_fx.export`: an optimised model is written, read back, and compared with the model before it counts."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gtp_fx.capture.signatures import tensors_in
from gtp_fx.errors import ExportError
from gtp_fx.graph.torch_internals import load_aoti, package_aoti
from gtp_fx.graph.verify import rounding_tolerance
from gtp_fx.model.exporting.cache import run_cache, write_cache
from gtp_fx.model.exporting.onnx import must_have_packages, run_onnx, write_onnx
from gtp_fx.model.exporting.program import Program, program_of
from gtp_fx.model.internal_errors import internal_errors_reported
from gtp_fx.model.optimized_model import OptimizedModel
from gtp_fx.options.progress import Steps, progress_bar

FORMATS = {
    "torch": "a torch.export program, .pt2: torch.export.load(file).module()",
    "aoti": (
        "an AOTInductor package, .pt2, compiled for the device the model is on: torch._inductor.aoti_load_package(file)"
    ),
    "onnx": "ONNX, .onnx: standard operators alone",
    "cache": (
        "compiled code, .cache, for gtp_fx itself on processors like this one: gtp_fx.load_cache(file) before the "
        "model's first call"
    ),
}
"""Formats by name, each with what it is and how it is loaded."""
_SUFFIX = {"torch": ".pt2", "aoti": ".pt2", "onnx": ".onnx", "cache": ".cache"}


@dataclass(frozen=True)
class Exported:
    """A file that `export` has written.

    file: its path.
    format: its format, a name in `FORMATS`.
    bytes: its size; large ONNX models keep their weights in a second file beside it.
    error: distance of its outputs from the model's on noise, |file - model| / |model|; None where it couldn't be run.
    unrun: why it couldn't be run; empty where it was.
    """

    file: str
    format: str
    bytes: int
    error: float | None
    unrun: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return asdict(self)

    def __str__(self) -> str:
        checked = f"not run: {self.unrun}" if self.error is None else f"run, within {self.error:.1e} of the model"
        return f"{self.file}: {FORMATS[self.format]}\n{self.bytes / 2**20:.1f} MiB; {checked}"


def export(model: OptimizedModel, file: str | Path, format: str | None = None, *, progress: bool = False) -> Exported:
    """Write an optimised model to a file that can be loaded without gtp_fx, or its compiled code to one for gtp_fx.

    The file has the evaluation graph for any batch, in plain ATen or ONNX operators. That holds for an AOTInductor
    package on a GPU as well: gtp_fx's kernels are used under `torch.compile` only. "cache" is another matter: no model,
    but what `warm_up` compiles of it, for other processes on such a machine (`gtp_fx.load_cache`).

    format: a name in `FORMATS`; None takes it from the file's suffix, where .pt2 stands for "torch".
    progress: show a progress bar, where stderr is a terminal.

    The file is read back and run. Raises ExportError where it can't be written or computes something else; nothing is
    written in that case.
    """
    path, chosen = Path(file), format_of(file, format)
    with progress_bar(progress) as show:
        steps = Steps(3, show)
        steps.begin("tracing, for any batch")
        made = program_of(model)
        steps.done()
        return _written(made, path, chosen, steps)


def _written(made: Program, path: Path, chosen: str, steps: Steps) -> Exported:
    """Write a program, read it back and compare it. Raises ExportError."""
    # Work in a scratch folder on the same file system, and move the files into place only after the check.
    with internal_errors_reported(), tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        draft = Path(scratch) / path.name
        steps.begin(f"writing {chosen}")
        _WRITE[chosen](made, draft)
        steps.done()
        steps.begin("reading back, checking")
        found = _RUN[chosen](draft, made)
        error = None if isinstance(found, str) else _error(found, made)
        steps.done()
        for part in Path(scratch).iterdir():
            part.replace(path.parent / part.name)
    return Exported(str(path), chosen, path.stat().st_size, error, found if isinstance(found, str) else "")


def format_of(file: str | Path, format: str | None) -> str:
    """Return the format in which `export` would write `file`; cheap, for checks before any work is done.

    Raises ExportError where the format is unknown or doesn't match the suffix, the folder doesn't exist or
    can't be written to, or a package that ONNX needs is missing.
    """
    path = Path(file)
    if format is None:
        format = {suffix: name for name, suffix in reversed(_SUFFIX.items())}.get(path.suffix)
        if format is None:
            raise ExportError(
                f"{path}: no format has this suffix; give .pt2, .onnx or .cache, or format= one of {', '.join(FORMATS)}"
            )
    if format not in FORMATS:
        known = "\n".join(f"  {name!r}: {meaning}" for name, meaning in FORMATS.items())
        raise ExportError(f"format={format!r} is unknown; give one of\n{known}")
    if path.suffix != _SUFFIX[format]:
        raise ExportError(f"{path}: a file of format {format!r} ends in {_SUFFIX[format]}")
    if not path.parent.is_dir():
        raise ExportError(f"{path}: {path.parent} is no directory; make it first")
    _must_be_writable(path)
    if format == "onnx":
        must_have_packages()
    return format


def _must_be_writable(path: Path) -> None:
    """Check that files can be written where `path` is. Raises ExportError, which names that place."""
    try:
        tempfile.TemporaryDirectory(dir=path.parent).cleanup()
    except OSError as error:
        raise ExportError(
            f"{path} can't be written: {error.strerror or error} in {path.parent.resolve()}; give another folder"
        ) from error


def _error(found: list[Tensor], made: Program) -> float:
    """Return the largest relative error over outputs, |file - model| / |model|.

    Raises ExportError where shapes differ or the error is more than rounding.
    """
    expected = made.results()
    if [tuple(a.shape) for a in found] != [tuple(b.shape) for b in expected]:
        raise ExportError(
            f"the written file returns shapes {[tuple(a.shape) for a in found]}, "
            f"and the model {[tuple(b.shape) for b in expected]}"
        )
    worst = 0.0
    for got, want in zip(found, expected, strict=True):
        got, want = got.cpu().double(), want.cpu().double()
        worst = max(worst, float((got - want).norm() / want.norm().clamp_min(1e-30)))
    limit = rounding_tolerance(expected[0].dtype)
    if not worst <= limit or math.isnan(worst):
        raise ExportError(
            f"the written file differs from the model by {worst:.2g} (relative) on noise, "
            f"more than rounding ({limit:.2g})"
        )
    return worst


def _write_torch(made: Program, file: Path) -> None:
    """Write a torch.export program."""
    torch.export.save(made.program, file)


def _run_torch(file: Path, made: Program) -> list[Tensor]:
    """Load a torch.export program and run it on the example."""
    with torch.no_grad():
        return tensors_in(torch.export.load(file).module()(*made.args, **made.kwargs))


def _write_aoti(made: Program, file: Path) -> None:
    """Compile and write an AOTInductor package."""
    with torch.no_grad():
        package_aoti(made.program, str(file))


def _run_aoti(file: Path, made: Program) -> list[Tensor]:
    """Load an AOTInductor package and run it on the example."""
    return tensors_in(load_aoti(str(file))(*made.args, **made.kwargs))


_WRITE = {"torch": _write_torch, "aoti": _write_aoti, "onnx": write_onnx, "cache": write_cache}
_RUN: dict[str, Callable[[Path, Program], list[Tensor] | str]] = {
    "torch": _run_torch,
    "aoti": _run_aoti,
    "onnx": run_onnx,
    "cache": run_cache,
}
"""By format: run a file on the program's example; return its outputs, or the reason why it can't be run."""
