"""Processors: one frozen value a file, and `detect`, which picks the machine's own.

target          what a target is
work            the work of a kernel, in amounts that a target turns into seconds
shared_figures  what several targets have in common
cpu             any CPU
h200, h100, a100, l4, rtx4090   NVIDIA's GPUs, by the driver's name for them
generic         any GPU that has no file of its own yet
tuned, cache    curves measured on this machine, and the user's cache where they are kept
"""

from gtp_fx.errors import OptionError, did_you_mean
from gtp_fx.targets.a100 import A100
from gtp_fx.targets.cpu import CPU
from gtp_fx.targets.generic import GENERIC_GPU
from gtp_fx.targets.h100 import H100
from gtp_fx.targets.h200 import H200
from gtp_fx.targets.l4 import L4
from gtp_fx.targets.rtx4090 import RTX4090
from gtp_fx.targets.target import Curve, Target
from gtp_fx.targets.tuned import load_tuned

if __name__ != "gtp_fx.targets":
    raise ImportError("import this package as gtp_fx.targets: under another name its values would exist twice")

TARGETS: dict[str, Target] = {t.name: t for t in (H200, H100, A100, L4, RTX4090, CPU, GENERIC_GPU)}

__all__ = ["CPU", "GENERIC_GPU", "TARGETS", "Curve", "Target", "detect", "listed", "target_named"]


def detect(device: str = "auto") -> Target:
    """Return this machine's target, with the curves that `gtp-fx tune` measured here, if it did.

    device: "cuda", "cpu", or "auto" for the GPU where torch can use one.
    """
    found = listed(device)
    return load_tuned(found) or found


def listed(device: str = "auto") -> Target:
    """Return this machine's target as listed in this folder, without measured curves.

    device: as in `detect`.
    """
    import torch  # here, so that names of targets cost nothing

    if device == "cpu" or not torch.cuda.is_available():
        return CPU.on_threads(torch.get_num_threads())
    name = torch.cuda.get_device_name()
    return next((target for target in TARGETS.values() if name in target.devices), GENERIC_GPU)


def target_named(target: str | Target) -> Target:
    """Return a target by its name ("auto" detects it), or the value itself. Raises OptionError for an unknown name.

    The name of this machine's own target means its measured curves, too, where there are some.
    """
    if isinstance(target, Target):
        return target
    if target == "auto":
        return detect()
    if target not in TARGETS:
        raise OptionError(
            f"target={target!r} is unknown; give 'auto' or one of {', '.join(map(repr, TARGETS))}"
            f"{did_you_mean(str(target), TARGETS)}"
        )
    import torch

    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        if listed(device).name == target:
            return detect(device)
    return TARGETS[target]
