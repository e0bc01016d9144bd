"""Processors: one frozen value a file, and `detect` that picks the machine's own.

target    what a target is
cpu       any CPU
generic   any GPU that has no file of its own yet
"""

import torch

from gtp_fx.errors import OptionError
from gtp_fx.targets.cpu import CPU
from gtp_fx.targets.generic import GENERIC_GPU
from gtp_fx.targets.target import Target

TARGETS: dict[str, Target] = {target.name: target for target in (CPU, GENERIC_GPU)}

__all__ = ["CPU", "GENERIC_GPU", "TARGETS", "Target", "detect", "target_named"]


def detect() -> Target:
    """The target of this machine: its GPU's where torch can use one, else the CPU's."""
    return GENERIC_GPU if torch.cuda.is_available() else CPU


def target_named(target: str | Target) -> Target:
    """A target from its name ("auto" detects it), or the value itself."""
    if isinstance(target, Target):
        return target
    if target == "auto":
        return detect()
    if target not in TARGETS:
        raise OptionError(f"target={target!r} is unknown; give 'auto' or one of {', '.join(map(repr, TARGETS))}")
    return TARGETS[target]
