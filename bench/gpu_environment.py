"""Record of the GPU and its limits: versions, torch's attention kernels, the rates of a copy and of a large product."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import asdict
from typing import Any

import torch

from bench.environment import Environment
from bench.gpu_stock import kernel_chosen
from gtp_fx.measure.timing import clock_for, interleave

_SIDE, _BYTES, _CALLS = 8192, 2**31, 5
_ASKED = "name,driver_version,power.limit,clocks.max.sm,clocks.max.memory,clocks.sm,temperature.gpu"


@torch.no_grad()
def environment(device: torch.device, dtype: torch.dtype, small: bool) -> dict[str, Any]:
    """Return the record; measuring the rates takes half a second.

    small: whether to use small sizes, for a dry run.
    """
    side, size = (256, 2**16) if small else (_SIDE, _BYTES)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.empty(size // dtype.itemsize, dtype=dtype, device=device)
    into = torch.empty_like(source)
    runs = {
        "product": lambda: [a @ b for _ in range(_CALLS)],
        "copy": lambda: [into.copy_(source) for _ in range(_CALLS)],
    }
    timings = interleave(runs, rounds=10, warmup=2, clock=clock_for(device))
    taken = {name: timings.spread(name).median / _CALLS for name in runs}
    q = torch.zeros(8, 6, 197, 64, dtype=dtype, device=device)
    return {
        **asdict(Environment.here(device.type)),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "gpu": _gpu(device),
        "driver": _driver(),
        "attention_chosen": {
            "plain": kernel_chosen(q, q, q),
            "mask": kernel_chosen(q, q, q, torch.zeros(8, 1, 1, 197, dtype=dtype, device=device)),
        },
        "product": {"side": side, "dtype": str(dtype), "flops_a_second": 2 * side**3 / taken["product"]},
        "copy": {"bytes": source.nbytes, "bytes_a_second": 2 * source.nbytes / taken["copy"]},
    }


def _gpu(device: torch.device) -> dict[str, Any]:
    """Return the GPU's properties; empty for another device."""
    if device.type != "cuda":
        return {}
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "capability": [found.major, found.minor],
        "multiprocessors": found.multi_processor_count,
        "memory": found.total_memory,
    }


def _driver() -> str:
    """Return nvidia-smi's output for the fields in `_ASKED`, or "" where there is no nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ("nvidia-smi", f"--query-gpu={_ASKED}", "--format=csv,noheader")
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except subprocess.TimeoutExpired:
        return ""
