"""The model that is evaluated, called with a batch of images alone, and what identifies it."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gtp_fx.capture.inputs import call_signature
from gtp_fx.capture.signatures import CallSignature, device_of, dtype_of, tensors_in
from gtp_fx.errors import OptionError, SaveError
from gtp_fx.model.saving import tensors

Model = Callable[[Tensor], Any]
"""From a batch of images to an output."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, and the form in which it is called.

    model: in eval mode.
    signature: its call, in which one argument is a tensor: the images.
    """

    model: nn.Module
    signature: CallSignature

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any, images: Tensor | None = None) -> Subject:
        """Return a model as a subject.

        example_inputs: as for `optimize`.
        images: some that it will be called with, which are the example where there is no other.

        Raises OptionError where it can't be called with images alone.
        """
        if model.training:
            raise OptionError("the model is in training mode: call model.eval() before it is evaluated")
        if example_inputs is None and images is not None:
            dtype = dtype_of(model) if images.is_floating_point() else None
            example_inputs = images.to(device_of(model), dtype or images.dtype)
        signature = call_signature(model, example_inputs)
        count = len(tensors_in((signature.args, signature.kwargs)))
        if count != 1:
            raise OptionError(
                f"{type(model).__name__} is called with {count} tensors, and images are one: give a module that makes "
                f"the others from them"
            )
        return cls(model, signature)

    @property
    def example(self) -> Tensor:
        """The example of images, [B, …]."""
        return tensors_in((self.signature.args, self.signature.kwargs))[0]

    def called(self, model: Callable[..., Any]) -> Model:
        """Return the model, or what takes its place, as a function of images alone."""
        if len(self.signature.args) == 1 and not self.signature.kwargs:
            return model
        leaves, spec = pytree.tree_flatten((self.signature.args, self.signature.kwargs))

        def call(images: Tensor) -> Any:
            args, kwargs = pytree.tree_unflatten([images if isinstance(x, Tensor) else x for x in leaves], spec)
            return model(*args, **kwargs)

        return call

    def placed(self, images: Tensor) -> Tensor:
        """Return images on the model's device, and in its dtype where they aren't integers."""
        is_float = images.is_floating_point() and self.example.is_floating_point()
        return images.to(self.example.device, self.example.dtype if is_float else images.dtype)

    @property
    def weights(self) -> str:
        """A digest of the weights; "" where they have none that could be recognised (quantised, sharded)."""
        try:
            return weights_of(self.model)
        except SaveError:
            return ""

    @property
    def dtype(self) -> str:
        """The weights' dtype by name."""
        return str(dtype_of(self.model)).removeprefix("torch.")

    @property
    def device(self) -> str:
        """The processor that the model is on, by its kind or a GPU's name."""
        device = device_of(self.model)
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    @property
    def machine(self) -> str:
        """The processor in words."""
        if device_of(self.model).type == "cuda":
            return self.device
        threads = torch.get_num_threads()
        return f"{self.device} ({platform.machine()}, {threads} thread{'s' * (threads > 1)})"


def weights_of(model: nn.Module) -> str:
    """Return a digest of a model's weights. Raises SaveError where they have no bits that a file could hold."""
    held = tensors.state_of(model)
    return tensors.digest_of_all({name: tensors.digest_of(tensor) for name, tensor in held.items()})
