"""Programs run as a reader runs them, each in a fork of one process that has torch and the model libraries loaded."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "timm", "transformers", "gtp_fx"])

_SECONDS = 280


def run_program(file: Path, *arguments: str, cwd: Path) -> str:
    """What the program prints. It has to end well; what it registers stays its own."""
    with tempfile.TemporaryDirectory() as folder:
        told, errors = Path(folder) / "stdout", Path(folder) / "stderr"
        process = _CONTEXT.Process(target=_run, args=(str(file), arguments, str(cwd), str(told), str(errors)))
        process.start()
        process.join(_SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
        assert process.exitcode == 0, f"{file.name}: {process.exitcode}: {errors.read_text()}"
        return told.read_text()


def _run(file: str, arguments: tuple[str, ...], cwd: str, told: str, errors: str) -> None:
    """Run `file` as the main program, its output and errors going to files."""
    for descriptor, name in ((1, told), (2, errors)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(cwd)
    sys.argv = [file, *arguments]
    sys.path.insert(0, str(Path(file).parent))
    runpy.run_path(file, run_name="__main__")
