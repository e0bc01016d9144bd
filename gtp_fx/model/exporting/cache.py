"""Compiled code as a file: what Inductor keeps on disk of one model, for processes elsewhere that compile the same."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from gtp_fx.capture.signatures import device_of, tensors_in
from gtp_fx.errors import ExportError, LoadError
from gtp_fx.graph.torch_internals import cache_misses, compiler_cache, fresh_compiler_cache, name_memory_formats
from gtp_fx.model.exporting.program import Program
from gtp_fx.model.forms import Forms
from gtp_fx.model.optimized_model import OptimizedModel
from gtp_fx.targets.tuned import cpu_name

BATCHES = (1, 8)
"""One image, and any number from two up."""

_VERSION = 1
_ABOUT, _ARTIFACTS, _CODE = "about.json", "artifacts", "code/"
_LEFT_OUT = ("fxgraph", "aotautograd", "locks", "triton")
"""Folders of Inductor's whose contents `torch.compiler.save_cache_artifacts` has, or that belong to one process."""


def write_cache(made: Program, file: Path) -> None:
    """Compile the program's model in an empty cache, and write what is in it then. Raises ExportError for none."""
    name_memory_formats()
    with fresh_compiler_cache() as folder, torch.inference_mode():
        compiling(made.model).warm_up(BATCHES)
        kept = torch.compiler.save_cache_artifacts()
        if kept is None:
            raise ExportError("torch keeps nothing of what it compiles: its caches are off, or it couldn't key a graph")
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(_ABOUT, json.dumps(_about(device_of(made.model)), indent=2))
            archive.writestr(_ARTIFACTS, kept[0])
            # Torch's artifacts hold graphs and sources; a CPU's machine code lies beside them.
            for path in sorted(folder.rglob("*")):
                inside = path.relative_to(folder)
                if path.is_file() and inside.parts[0] not in _LEFT_OUT:
                    archive.write(path, _CODE + inside.as_posix())


def run_cache(file: Path, made: Program) -> list[Tensor]:
    """Load a cache where nothing is cached, and run the program's example with it.

    Raises ExportError where torch compiles anything anew.
    """
    with fresh_compiler_cache() as folder, torch.inference_mode():
        load_cache(file)
        before, there = cache_misses(), _binaries(folder)
        model = compiling(made.model)
        model.warm_up(BATCHES)
        found = tensors_in(model(*made.args, **made.kwargs))
        if cache_misses() > before or _binaries(folder) != there:
            raise ExportError("torch doesn't find again what it kept of this model: it compiles anew in each process")
    return found


def load_cache(file: str | Path) -> None:
    """Put compiled code that `gtp_fx.export` wrote where torch looks for it; call it before the model's first call.

    The same model, optimised with the same options by the same torch, then compiles nothing: what remains of the first
    call is tracing, and small programs by which torch may ask what the processor can do. Any other model compiles as
    ever.

    The file holds pickles and machine code, which run: load only what you trust.

    Raises LoadError where the file can't be read, or is another torch's or processor's.
    """
    name_memory_formats()
    path = Path(file)
    try:
        with zipfile.ZipFile(path) as archive:
            about, artifacts = json.loads(archive.read(_ABOUT)), archive.read(_ARTIFACTS)
            code = {name: archive.read(name) for name in archive.namelist() if name.startswith(_CODE)}
        here = _about(torch.device(about["device"]))
    except (OSError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or error
        raise LoadError(f"{path} can't be read as compiled code that gtp_fx.export wrote: {reason}") from error
    if differ := [
        f"{name} {about.get(name)!r}, here {value!r}" for name, value in here.items() if about.get(name) != value
    ]:
        raise LoadError(f"{path} holds code that can't run here: {'; '.join(differ)}: export it anew, here")
    for name, content in code.items():
        _put(compiler_cache().joinpath(*PurePosixPath(name).relative_to(_CODE).parts), content)
    if torch.compiler.load_cache_artifacts(artifacts) is None:
        raise LoadError(f"{path} holds artifacts that this torch can't read: export it anew, here")


def compiling(model: OptimizedModel) -> OptimizedModel:
    """Return the model over the same parameters, with the same schedules, compiled at its first call and not yet."""
    make, args, (state, own) = model.__reduce_ex__(4)
    kept = tuple(replace(form, model=compiling(form.model)) for form in state.forms.kept)
    new: OptimizedModel = make(*args)
    new.__setstate__((replace(state, compile=True, forms=Forms(kept, state.forms.calls)), own))
    return new


def _about(device: torch.device) -> dict[str, Any]:
    """Return what compiled code belongs to."""
    if device.type == "cuda":
        processor = f"{torch.cuda.get_device_name(device)}" if torch.cuda.is_available() else "no GPU"
    else:
        # Its code is for this number of threads.
        processor = f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return {"version": _VERSION, "torch": torch.__version__, "device": device.type, "processor": processor}


def _binaries(folder: Path) -> set[Path]:
    """Return the libraries in Inductor's folder: machine code that a C++ compiler made."""
    return set(folder.rglob("*.so"))


def _put(file: Path, content: bytes) -> None:
    """Write a file whole, unless it is there: other processes may read it, or write the same."""
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=file.parent)
    with os.fdopen(handle, "wb") as out:
        out.write(content)
    os.replace(draft, file)
