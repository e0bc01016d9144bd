"""Analysis of a wrong kernel: its smallest failing case, its memory accesses, and its result with fewer warps.

Cases run in processes of their own, since an invalid memory access makes the GPU unusable for its process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import torch

from bench.gpu_checks import DRY, NETS, OTHERS, Case, cases
from bench.gpu_turns import Turn

_SANITIZERS = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")
_TOLD = 6_000
"""Number of last characters of a tool's output that are kept."""
WARPS = (1, 2, 4)


def cases_of(kernel: str, small: bool) -> list[Case]:
    """Return the cases that call a kernel, the smallest first. Raises ValueError where there is none."""
    sizes = (DRY,) if small else (OTHERS, NETS)
    found = [case for size in sizes for case in cases(size) if kernel in case.kernels]
    if not found:
        known = sorted({name for case in cases(DRY) for name in case.kernels})
        raise ValueError(f"no case calls {kernel!r}; there are {', '.join(known)}")
    return sorted(found, key=lambda case: prod(case.size))


def run_case(case: Case, device: torch.device) -> dict[str, Any]:
    """Run a case and return its checks as a JSON-able dict."""
    checks = list(case.checks(device))
    if device.type == "cuda":
        torch.cuda.synchronize()
    rows = [{**asdict(check), "right": check.right} for check in checks]
    return {"size": case.size, "dtype": str(case.dtype), "right": all(check.right for check in checks), "checks": rows}


def find_failing(kernel: str, device: torch.device, small: bool, turn: Turn) -> None:
    """Find the first failing case. A case is recorded before it runs, in case it ends the process."""
    for place, case in enumerate(cases_of(kernel, small)):
        turn.keep({"place": place, "size": case.size, "dtype": str(case.dtype), "right": False})
        found = run_case(case, device)
        if not found["right"]:
            turn.keep({"place": place, **found})
            return
    turn.keep({"place": None, "right": True})


def sanitized(kernel: str, tool: str, folder: Path, small: bool) -> dict[str, Any]:
    """Run the failing case under compute-sanitizer, or without it in a dry run or where it isn't installed.

    tool: one of compute-sanitizer's tools.
    """
    failing = _failing(kernel, tool, folder, small)
    place = failing["place"] or 0
    program = None if small else next((found for name in _SANITIZERS if (found := shutil.which(name))), None)
    ahead = [] if program is None else [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
    # Without caching, each tensor is an allocation of its own, so that reading beyond it is detected.
    ended, printed = _run(ahead, f"case-{kernel}-{place}", folder, small, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    return {
        "failing": failing,
        "tool": tool if program else f"{NO_TOOL}, {tool} wasn't run",
        "exit": ended,
        "end": printed,
    }


NO_TOOL = "no compute-sanitizer here"


def by_warps(kernel: str, folder: Path, small: bool) -> dict[str, Any]:
    """Run the failing case with 1, 2 and 4 warps, not pipelined. A race or miscompiled loop shows as a difference."""
    failing = _failing(kernel, "warps", folder, small)
    found = {}
    for warps in WARPS:
        name = f"case-{kernel}-{failing['place'] or 0}-{warps}"
        ended, printed = _run([], name, folder, small)
        file = folder / "found" / f"{name}.json"
        found[str(warps)] = json.loads(file.read_text()) if file.exists() else {"exit": ended, "end": printed}
    return {"failing": failing, "warps": found}


def relaunch(warps: int) -> None:
    """Make this process launch all kernels with `warps` warps and one stage."""
    options = {"num_warps": warps, "num_stages": 1}
    for name, module in list(sys.modules.items()):
        if name.startswith("gtp_fx.kernels.") and hasattr(module, "launcher"):
            vars(module)["launcher"] = _with_options(module.launcher, options)


def _with_options(launcher: Callable[[Any], Any], options: dict[str, int]) -> Callable[[Any], Any]:
    class Launch:
        def __init__(self, kernel: Any) -> None:
            self.made = launcher(kernel)

        def __getitem__(self, grid: Any) -> Callable[..., Any]:
            launch = self.made[grid]
            return lambda *arguments, **given: launch(*arguments, **{**given, **options})

    return Launch


def _failing(kernel: str, who: str, folder: Path, small: bool) -> dict[str, Any]:
    """Return the first failing case, as `find_failing` records it; its place is None where all are right."""
    name = f"failing-{kernel}-{who}"
    file = folder / "found" / f"{name}.json"
    file.unlink(missing_ok=True)
    ended, printed = _run([], name, folder, small)
    if not file.exists():
        return {"place": None, "right": False, "exit": ended, "end": printed}
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def _run(
    ahead: Sequence[str], stage: str, folder: Path, small: bool, more: dict[str, str] | None = None
) -> tuple[int, str]:
    """Run a stage of `bench.gpu_stages`. Return its exit code and the end of its output."""
    command = [*ahead, sys.executable, "-m", "bench.gpu_stages", stage, "--folder", str(folder)]
    command += ["--dry-run"] if small else []
    done = subprocess.run(
        command, env={**os.environ, **(more or {})}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    return done.returncode, done.stdout.decode(errors="replace")[-_TOLD:]
