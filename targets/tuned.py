"""Curves measured on this machine, in the user's cache: written by `gtp-fx tune`, read by `detect`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gtp_fx.errors import OptionError
from gtp_fx.targets.cache import cache_folder, keep_json
from gtp_fx.targets.target import Curve, Target

_VERSION = 1


def machine_key(target: Target) -> str:
    """Return what measured curves belong to: the processor, its number of threads, and the torch whose kernels ran."""
    import torch  # here, so that names of targets cost nothing

    if target.device == "cuda":
        processor = torch.cuda.get_device_name()
    else:
        processor = f"{cpu_name()}, {torch.get_num_threads()} threads"
    return f"{processor}, torch {torch.__version__}"


def tuned_file(target: Target) -> Path:
    """Return the file of this machine's measured curves. It need not exist."""
    digest = hashlib.sha256(machine_key(target).encode()).hexdigest()[:16]
    return cache_folder() / "targets" / f"{target.name}-{digest}.json"


def save_tuned(target: Target) -> Path:
    """Keep a measured target for this machine; return the file."""
    file = tuned_file(target)
    keep_json(file, as_dict(target))
    return file


def load_tuned(target: Target) -> Target | None:
    """Return `target` with the curves measured on this machine; None where no file with such curves can be read."""
    try:
        return from_dict(target, json.loads(tuned_file(target).read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def as_dict(target: Target) -> dict[str, Any]:
    """Return what `gtp-fx tune` measures, ready for JSON."""
    return {
        "version": _VERSION,
        "target": target.name,
        "machine": machine_key(target),
        "measured": target.measured,
        "dense": dict(target.dense),
        "bandwidth": target.bandwidth,
        "launch": target.launch,
        "curves": {kind: [list(point) for point in curve.points] for kind, curve in target.curves.items()},
    }


def from_dict(target: Target, data: Mapping[str, Any]) -> Target:
    """Return `target` with the figures that `as_dict` returned.

    Raises OptionError where they are another target's or version's, KeyError where they are incomplete.
    """
    if data["version"] != _VERSION or data["target"] != target.name:
        raise OptionError(f"measured for {data['target']!r}, version {data['version']}")
    curves = {kind: Curve(tuple((float(a), float(s)) for a, s in points)) for kind, points in data["curves"].items()}
    return replace(
        target,
        dense={dtype: float(rate) for dtype, rate in data["dense"].items()},
        bandwidth=float(data["bandwidth"]),
        launch=float(data["launch"]),
        curves={**target.curves, **curves},
        measured=str(data["measured"]),
        tiles=(),  # a measured curve includes what tiles cost
        sources={**target.sources, "measured": f"{data['measured']} on {data['machine']}"},
    )


def cpu_name() -> str:
    """Return the CPU's name: on Linux from /proc/cpuinfo, elsewhere from the platform."""
    import platform

    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
