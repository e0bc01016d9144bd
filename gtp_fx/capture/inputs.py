"""What a user gives as `example_inputs`, as the signatures of the calls that a model is captured for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gtp_fx.capture.descriptions import shown
from gtp_fx.capture.example_images import example_image, image_argument
from gtp_fx.capture.signatures import Call, CallSignature, canonical_arguments, tensors_in, two_images
from gtp_fx.capture.wrapped import must_be_traceable
from gtp_fx.errors import CaptureError


def call_signatures(model: nn.Module, example_inputs: Any) -> tuple[CallSignature, ...]:
    """Return the signatures of the calls that a user gives examples of: one, or a list of several, each form once.

    Raises what `call_signature` raises, of each of them.
    """
    if not isinstance(example_inputs, list) or not example_inputs:
        return (call_signature(model, example_inputs),)
    found: list[CallSignature] = []
    for example in example_inputs:
        try:
            signature = call_signature(model, example)
        except CaptureError as error:
            raise CaptureError(f"{error} (a list holds several examples; the arguments of one are a tuple)") from error
        if not any(known.takes(signature.args, signature.kwargs) for known in found):
            found.append(signature)
    return tuple(found)


def call_signature(model: nn.Module, example_inputs: Any) -> CallSignature:
    """Return the signature of a call with `example_inputs`.

    example_inputs: a tensor, a tuple of positional arguments, a mapping of keyword arguments, or None to derive an
        image batch from the model's configuration.

    Raises CaptureError where they hold no tensor or don't fit the model's forward.
    """
    must_be_traceable(model)
    call = _split(model, example_inputs)
    if not tensors_in(call):
        raise CaptureError(
            f"example_inputs={shown(example_inputs)} hold no tensor; give an image batch such as [2, 3, 224, 224]"
        )
    return signature_of(model, call)


def signature_of(model: nn.Module, call: Call) -> CallSignature:
    """Return the signature of a call. Raises CaptureError where it doesn't fit the model's forward."""
    must_be_traceable(model)
    try:
        parameters = inspect.signature(model.forward)
    except (TypeError, ValueError) as error:
        raise CaptureError(f"{type(model).__name__}.forward has no signature to call it by: {error}") from error
    try:
        args, kwargs = canonical_arguments(parameters, *call)
    except TypeError as error:
        raise CaptureError(f"example_inputs don't fit {type(model).__name__}.forward{parameters}: {error}") from error
    given = args, kwargs
    args, kwargs = pytree.tree_map_only(Tensor, two_images, given)
    return CallSignature(parameters, args, kwargs, given)


def _split(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split what the user gave into positional and keyword arguments. Raises CaptureError for an unusable type."""
    if example_inputs is None:
        image, name = example_image(model), image_argument(model)
        return ((image,), {}) if name is None else ((), {name: image})
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    raise CaptureError(
        f"example_inputs={shown(example_inputs)}: give a tensor, a tuple of arguments or a dict of keyword arguments"
    )
