"""What is compiled in a graph's place on some processor: the last step of both doors, and of them alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import fx

from gtp_fx.passes.lower_to_kernels import lower_to_kernels

_LEAST_CAPABILITY = (8, 0)
"""Ampere: the kernels' tiles want its shared memory, and bfloat16 its tensor cores."""


def lowered(gm: fx.GraphModule, device: torch.device, disabled: Sequence[str] = ()) -> fx.GraphModule:
    """`gm` in Triton kernels where `device` is a GPU that they are made for, and `gm` itself elsewhere or where that pass is disabled.

    Export and eager runs take `gm`, which is plain ATen.
    """
    return lower_to_kernels(gm) if has_kernels(device) and "lower_to_kernels" not in disabled else gm


def has_kernels(device: torch.device) -> bool:
    """Whether GTP's kernels run on `device`: an NVIDIA GPU of Ampere's generation or later, with Triton installed."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and importlib.util.find_spec("triton") is not None
        and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY
    )
