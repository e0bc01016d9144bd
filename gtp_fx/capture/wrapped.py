"""Modules that hold a model in a form that can't be traced, and what to give in their place."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from gtp_fx.errors import CaptureError


def must_be_traceable(model: nn.Module) -> None:
    """Raise CaptureError where TorchScript has compiled `model`, or where it has weights that aren't made yet."""
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"this {_script_name(model)} is compiled by TorchScript, which can't be traced: give the module that "
            f"torch.jit.script or torch.jit.trace was given"
        )
    held = itertools.chain(model.named_parameters(), model.named_buffers())
    if lazy := [name for name, value in held if is_lazy(value)]:
        raise CaptureError(f"{lazy[0]} is a lazy layer's and isn't made yet: call the model once with its inputs")


def what_to_give(model: nn.Module) -> str:
    """Return what stands in the way of tracing `model`, by its class or its parts', and what to give; "" if unknown."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return "DistributedDataParallel can't be traced: optimise the module inside, model.module, and wrap the result"
    for name, part in model.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            return (
                f"{name} is compiled by TorchScript ({_script_name(part)}), which can't be traced: build the model "
                f"with the module that torch.jit.script was given"
            )
        if type(part).__module__.startswith("torch.ao.nn.quantized"):
            return (
                f"{name} is a {type(part).__name__} of torch.ao's eager quantisation, whose packed weights can't be "
                f"traced: optimise the model in floating point, and quantise the result (torchao's quantize_)"
            )
    return ""


def _script_name(module: torch.jit.ScriptModule) -> str:
    return str(getattr(module, "original_name", type(module).__name__))
