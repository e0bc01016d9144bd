"""Example inputs: what a model is captured with, found from its own configuration where it has one."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gtp_fx.errors import CaptureError, InputError

_BATCH = 2
"""Captured with two images: a batch of one would be baked into the graph."""


@dataclass(frozen=True)
class CallSignature:
    """How a model is called: arguments in canonical form, with tensors as examples of two images.

    Two calls have the same form when their arguments differ only in the batch and in the tensors' values.
    """

    parameters: inspect.Signature
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def like(self, model: nn.Module, was: torch.dtype | None) -> CallSignature:
        """With examples where `model` is now, and those of the dtype that its weights had in the one that they have."""
        device, dtype = device_of(model), dtype_of(model)

        def moved(example: Tensor) -> Tensor:
            if example.is_meta and device.type != "meta":
                example = torch.zeros_like(example, device=device)
            return example.to(device, dtype if dtype is not None and example.dtype == was else example.dtype)

        args, kwargs = pytree.tree_map_only(Tensor, moved, (self.args, self.kwargs))
        return CallSignature(self.parameters, args, kwargs)

    def takes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call has this form."""
        try:
            self.canonical(args, kwargs)
        except InputError:
            return False
        return True

    def canonical(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call in the captured form. Raises InputError where the call has another."""
        try:
            found = canonical_arguments(self.parameters, args, kwargs)
        except TypeError as error:
            raise InputError(f"the model can't be called like this: {error}") from error
        mine, my_spec = pytree.tree_flatten((self.args, self.kwargs))
        theirs, their_spec = pytree.tree_flatten(found)
        if my_spec != their_spec or not all(map(_same_form, mine, theirs)):
            raise InputError(
                f"this model was optimised for {describe(self.args, self.kwargs)} and called with {describe(*found)}: the "
                f"graph is good for any batch of that form only; for another, call gtp_fx.optimize(model, "
                f"example_inputs=…) again with such inputs"
            )
        return found


def call_signature(model: nn.Module, example_inputs: Any) -> CallSignature:
    """From what a user gave: a tensor, a sequence of positional arguments, or a mapping of keyword arguments."""
    args, kwargs = _split(model, example_inputs)
    if not tensors_in((args, kwargs)):
        raise CaptureError(
            f"example_inputs={example_inputs!r} hold no tensor; give an image batch such as [2, 3, 224, 224]"
        )
    parameters = inspect.signature(model.forward)
    try:
        args, kwargs = canonical_arguments(parameters, args, kwargs)
    except TypeError as error:
        raise CaptureError(f"example_inputs don't fit {type(model).__name__}.forward{parameters}: {error}") from error
    args, kwargs = pytree.tree_map_only(Tensor, _two_images, (args, kwargs))
    return CallSignature(parameters, args, kwargs)


def canonical_arguments(
    parameters: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments as positional ones first, those that repeat a default left out."""
    bound = parameters.bind(*args, **kwargs)
    for name in list(bound.arguments):
        default = parameters.parameters[name].default
        value = bound.arguments[name]
        if default is not inspect.Parameter.empty and not isinstance(value, Tensor) and _is(value, default):
            del bound.arguments[name]
    return bound.args, bound.kwargs


def tensors_in(value: Any) -> list[Tensor]:
    """Of whatever a model takes or returns, in pytree's order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def device_of(model: nn.Module) -> torch.device:
    """Where its first parameter or buffer is now; the CPU where it has none."""
    held = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if held is None else held.device


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """Of its first parameter of real numbers; None where it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """ "(float32[*, 3, 224, 224])", the batch left open."""

    def show(value: Any) -> str:
        if not isinstance(value, Tensor):
            return repr(value)
        sides = ", ".join(["*", *map(str, value.shape[1:])]) if value.ndim else ""
        return f"{str(value.dtype).removeprefix('torch.')}[{sides}]"

    parts = [show(v) for v in pytree.tree_leaves(args)] + [f"{k}={show(v)}" for k, v in kwargs.items()]
    return f"({', '.join(parts)})"


def _same_form(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, Tensor) != isinstance(theirs, Tensor):
        return False
    if not isinstance(mine, Tensor):
        return _is(mine, theirs)
    # Of real numbers the dtype may be another: autocast, or weights that were replaced by those of another.
    same_kind = mine.dtype == theirs.dtype or (mine.is_floating_point() and theirs.is_floating_point())
    return bool(same_kind and mine.shape[1:] == theirs.shape[1:] and mine.ndim == theirs.ndim)


def _is(value: Any, other: Any) -> bool:
    """Equal, and of one type: 3, 3.0 and True take a forward different ways."""
    return type(value) is type(other) and bool(value == other)


def _split(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if example_inputs is None:
        return (), {_image_argument(model): _example_image(model)}
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return tuple(example_inputs), {}
    raise CaptureError(
        f"example_inputs={example_inputs!r}: give a tensor, a tuple of arguments or a dict of keyword arguments"
    )


def _image_argument(model: nn.Module) -> str:
    """HF models name theirs ("pixel_values"); others take the image first."""
    named = getattr(model, "main_input_name", None)
    return str(named) if named else next(iter(inspect.signature(model.forward).parameters), "x")


def _example_image(model: nn.Module) -> Tensor:
    """[2, channels, height, width], from timm's `pretrained_cfg` or HF's `config`."""
    shape = _timm_shape(model) or _hf_shape(model)
    if shape is None:
        raise CaptureError(
            f"{type(model).__name__} has neither timm's pretrained_cfg nor a HF config to tell its input size: give "
            f"example_inputs=torch.randn(2, 3, 224, 224), or whatever it takes; on the command line, let the factory say "
            f"model.pretrained_cfg = {{'input_size': (3, 224, 224)}}"
        )
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(_BATCH, *shape, dtype=like.dtype, device=like.device)


def _timm_shape(model: nn.Module) -> tuple[int, ...] | None:
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, Mapping) or "input_size" not in config:
        return None
    channels, *sides = config["input_size"]
    # A model made with in_chans= or img_size= keeps its pretrained_cfg: the first convolution knows its channels, the patch
    # embedding the size it was made for.
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    embed = getattr(model, "patch_embed", None)
    return (first.in_channels if first else channels, *(getattr(embed, "img_size", None) or sides))


def _hf_shape(model: nn.Module) -> tuple[int, ...] | None:
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", config)  # a tower that keeps the configuration of the whole
    side = getattr(config, "image_size", None)
    if side is None:
        return None
    sides = (side, side) if isinstance(side, int) else tuple(side)
    return (getattr(config, "num_channels", 3), *sides)


def _two_images(tensor: Tensor) -> Tensor:
    if tensor.ndim == 0 or tensor.shape[0] == 0:
        raise CaptureError(
            f"an example input of shape {list(tensor.shape)} has no image in it; its first side is the batch"
        )
    return tensor if tensor.shape[0] >= _BATCH else torch.cat([tensor] * _BATCH)
