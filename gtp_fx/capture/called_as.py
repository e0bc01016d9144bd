"""What else a model is called by: `forward_features`, `get_image_features`, `get_classifier`, `reset_classifier`.

A method that takes tensors is a forward of its own, so it is captured as the forward was, and optimised with the same schedule where it
has the same blocks; one that has none (a head on finished tokens) is captured all the same, so that it follows the stand-in's
weights and mode. A method that takes none asks or changes the model: it runs on the original, and where that changed
something the graphs are made anew.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


class CalledAs(nn.Module):
    """Another module called in another way: `forward` over the very same parameters, in the other's mode.

    signature: how it is called; where None, as `forward` says.
    """

    _owner: nn.Module

    def __init__(
        self, owner: nn.Module, forward: Callable[..., Any], signature: inspect.Signature | None = None
    ) -> None:
        object.__setattr__(self, "_owner", owner)
        training = owner.training
        super().__init__()
        self._parameters, self._buffers, self._modules = owner._parameters, owner._buffers, owner._modules
        self._non_persistent_buffers_set = owner._non_persistent_buffers_set
        self.training = training
        self.forward = forward if signature is None else _spelled(forward, signature)
        for attribute in ("main_input_name", "config", "pretrained_cfg"):
            if hasattr(owner, attribute):
                object.__setattr__(self, attribute, getattr(owner, attribute))

    def _get_name(self) -> str:
        return f"{type(self._owner).__name__}.{getattr(self.forward, '__name__', 'forward')}"

    @property
    def training(self) -> bool:  # type: ignore[override]
        return self._owner.training

    @training.setter
    def training(self, mode: bool) -> None:
        self._owner.training = mode


def _spelled(function: Callable[..., Any], signature: inspect.Signature) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward
