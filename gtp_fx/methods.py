"""What else a model is called by: `forward_features`, `get_image_features`, `get_classifier`, `reset_classifier`.

A method that takes tensors is a forward of its own, so it is captured and optimised as the forward was, with the same schedule; one
that attends to nothing (a head on finished tokens) runs as it is. A method that takes none asks or changes the model: it runs on
the original, and where that changed something the graphs are made anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class MethodModule(nn.Module):
    """A module whose forward is another one's method, over the very same parameters, in the other's mode."""

    _original: nn.Module

    def __init__(self, original: nn.Module, name: str) -> None:
        object.__setattr__(self, "_original", original)
        training = original.training
        super().__init__()
        self._parameters, self._buffers, self._modules = original._parameters, original._buffers, original._modules
        self._non_persistent_buffers_set = original._non_persistent_buffers_set
        self.training = training
        self.forward = getattr(original, name)
        for attribute in ("main_input_name", "config", "pretrained_cfg"):
            if hasattr(original, attribute):
                object.__setattr__(self, attribute, getattr(original, attribute))

    @property
    def training(self) -> bool:  # type: ignore[override]
        return self._original.training

    @training.setter
    def training(self, mode: bool) -> None:
        self._original.training = mode


def run_on_original(
    original: nn.Module, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, bool]:
    """What `method` returned, and whether it changed the model that it belongs to: its modules, parameters or plain attributes."""
    before = _state_of(original)
    result = method(*args, **kwargs)
    return result, _state_of(original) != before


def _state_of(model: nn.Module) -> list[Any]:
    """Everything that a graph of the model may rest on, as values that can be compared."""
    found: list[Any] = []
    for name, module in model.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str | tuple | torch.dtype)
        }
        tensors = {key: id(value) for key, value in (*module._parameters.items(), *module._buffers.items())}
        found.append((name, id(module), repr(plain), tensors))
    return found
