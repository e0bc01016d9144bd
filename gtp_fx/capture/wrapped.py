"""Modules that hold a model in a form that can't be traced, and what to give in their place."""

from __future__ import annotations

import inspect
import itertools

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from gtp_fx.capture.hooks import user_hooks
from gtp_fx.errors import CaptureError, warn
from gtp_fx.graph.torch_internals import given_to_compile

_IN_FLOATING_POINT = ("FloatFunctional", "FXFloatFunctional")
"""Of torch.ao.nn.quantized, but plain sums and products until the model is quantised; many decoders have them."""
_DATA_PARALLEL = (
    "DataParallel can't be traced on GPUs, among which it divides the batch: optimise the module inside, model.module, "
    "and wrap the result in DistributedDataParallel"
)


def without_compiling(model: nn.Module) -> nn.Module:
    """Return the module that torch.compile was given, where `model` is what it returned; else `model`.

    Warns of hooks on what it returned, since that isn't called any more.
    """
    inside = given_to_compile(model)
    if inside is None:
        return model
    if user_hooks(model):
        warn(
            "forward hooks on what torch.compile returned don't run: it is the module inside that is optimised",
        )
    return without_compiling(inside)


def passed_on(model: nn.Module) -> nn.Module | None:
    """Return the module inside of one that takes any arguments, holds nothing else and no parameter; None else.

    Such are DataParallel, AveragedModel, and wrappers like them: what they are called with is for the module inside.
    """
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # a forward that isn't written in Python
        return None
    children = list(model.children())
    passes_on = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
    return without_compiling(children[0]) if passes_on and len(children) == 1 and not model._parameters else None


def must_be_traceable(model: nn.Module) -> None:
    """Raise CaptureError where `model` is compiled by TorchScript, distributed, or has weights that aren't made yet."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise CaptureError(
            "DistributedDataParallel can't be traced: optimise the module inside and wrap the result, "
            "DistributedDataParallel(gtp_fx.optimize(model.module, …))"
        )
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        raise CaptureError(_DATA_PARALLEL)
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
    if isinstance(model, nn.DataParallel):
        return _DATA_PARALLEL
    for name, part in model.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            return (
                f"{name} is compiled by TorchScript ({_script_name(part)}), which can't be traced: build the model "
                f"with the module that torch.jit.script was given"
            )
        packed = type(part).__module__.startswith("torch.ao.nn.quantized")
        if packed and type(part).__name__ not in _IN_FLOATING_POINT:
            return (
                f"{name} is a {type(part).__name__} of torch.ao's eager quantisation, whose packed weights can't be "
                f"traced: optimise the model in floating point, and quantise the result (torchao's quantize_)"
            )
    return ""


def _script_name(module: torch.jit.ScriptModule) -> str:
    return str(getattr(module, "original_name", type(module).__name__))
