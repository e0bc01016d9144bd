"""Record of where a figure was measured: processor, versions, commit. Every result file includes it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from gtp_fx.targets.tuned import cpu_name

_ROOT = Path(__file__).resolve().parent.parent
_OF_ALLOCATORS = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
_PACKAGES = ("torch", "timm", "transformers", "triton")


@dataclass(frozen=True)
class Environment:
    """Machine and software of a measurement.

    processor: processor that ran the model.
    threads: torch's number of CPU threads.
    system: operating system and number of logical cores.
    versions: versions of Python and of the packages that affect the code that ran.
    commit: this repository's commit; outside git, $GTP_FX_COMMIT or "unknown".
    allocator: what the environment says of how the host's memory is allocated, which may be a tenth of a run's time.
    dirty: whether tracked files differed from the commit.
    utc: time of the measurement.
    """

    processor: str
    threads: int
    system: str
    versions: dict[str, str]
    commit: str
    allocator: dict[str, str]
    dirty: bool
    utc: str

    @classmethod
    def here(cls, device: str) -> Environment:
        """Return the environment of this process, which runs models on `device`."""
        return cls(
            processor=torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
            threads=torch.get_num_threads(),
            system=f"{platform.system()} {platform.machine()}, {os.cpu_count()} logical cores",
            versions={"python": platform.python_version(), **_versions()},
            commit=_git("rev-parse", "HEAD") or os.environ.get("GTP_FX_COMMIT") or "unknown",
            allocator={name: value for name, value in os.environ.items() if name.startswith(_OF_ALLOCATORS)},
            dirty=bool(_git("status", "--porcelain", "--untracked-files=no")),
            utc=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )

    def __str__(self) -> str:
        state = " with changes" if self.dirty else ""
        return (
            f"{self.processor}, {self.threads} threads, torch {self.versions['torch']}, commit {self.commit[:9]}{state}"
        )


def _versions() -> dict[str, str]:
    """Return the packages' versions, or "not installed", by name."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _git(*arguments: str) -> str:
    """Return git's output, or "" where there is no git or no repository."""
    try:
        done = subprocess.run(("git", *arguments), cwd=_ROOT, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
