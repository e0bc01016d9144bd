"""Methods other than `forward` by which a model is called: `forward_features`, `get_image_features`, `get_classifier`.

A method that takes tensors is a forward pass of its own. It is captured as `forward` was, and optimised with the same
schedule if it has the same blocks. A method without blocks (a head on finished tokens) is captured too, so that it
follows the optimised model's weights and mode.

A method that takes no tensors (`get_classifier`, `reset_classifier`) queries or changes the model. It runs on the
original; if the original changed, the graphs are captured again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


class CalledAs(nn.Module):
    """View of a module that shares its parameters and training mode, and runs another function as its `forward`.

    owner: the module that is viewed.
    forward: function to run.
    signature: signature to present to the exporter; `forward`'s own where None.
    """

    _owner: nn.Module

    def __init__(
        self, owner: nn.Module, forward: Callable[..., Any], signature: inspect.Signature | None = None
    ) -> None:
        # The owner is set before nn.Module.__init__, which writes `training`, a property that forwards to the owner. It
        # bypasses nn.Module.__setattr__, which would register the owner as a submodule.
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


def owner_of(module: nn.Module) -> nn.Module:
    """Return the module that a view is of, or the module itself."""
    while isinstance(module, CalledAs):
        module = module._owner
    return module


def _spelled(function: Callable[..., Any], signature: inspect.Signature) -> Callable[..., Any]:
    """Wrap `function` so that `inspect.signature` reports `signature`."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward
