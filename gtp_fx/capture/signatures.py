"""Signatures of calls: the form in which a model is called, by which a later call is taken or refused.

A form is the arguments' structure, every size but the first, and what isn't a tensor; for a model whose forward reads
integers, all sizes and those integers as well.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gtp_fx.capture.descriptions import describe, dtype_name, holds_values, is_array
from gtp_fx.capture.other_forms import advice
from gtp_fx.capture.snapshots import is_same
from gtp_fx.errors import CaptureError, InputError
from gtp_fx.graph.torch_internals import is_fake

BATCH = 2
"""Images in an example input. torch.export would specialise the graph to a batch of one."""

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call."""


@dataclass(frozen=True)
class CallSignature:
    """The form in which a model is called. Two calls have the same form if only batch size and tensor values differ.

    parameters: signature of the model's forward.
    args: positional arguments in canonical form; tensors are examples with at least two images.
    kwargs: keyword arguments, likewise.
    given: the call that they were made of, in canonical form.
    fixed: whether the values of integer tensors are part of the form, and every size, the first one included: the
        examples are the call as it was given.
    """

    parameters: inspect.Signature
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: Call | None = None
    fixed: bool = False

    def like(self, model: nn.Module, was: torch.dtype | None) -> CallSignature:
        """Return the signature with its examples on `model`'s device. Examples of dtype `was` get `model`'s dtype.

        was: dtype that the weights had when the signature was made.
        """
        device, dtype = device_of(model), dtype_of(model)

        def moved(example: Tensor) -> Tensor:
            if example.is_meta and device.type != "meta":
                example = torch.zeros_like(example, device=device)
            return example.to(device, dtype if dtype is not None and example.dtype == was else example.dtype)

        args, kwargs = pytree.tree_map_only(Tensor, moved, (self.args, self.kwargs))
        given = None if self.given is None else pytree.tree_map_only(Tensor, moved, self.given)
        return replace(self, args=args, kwargs=kwargs, given=given)

    def with_fixed_values(self) -> CallSignature | None:
        """Return the signature of calls with the same sizes and the same integers; None where none are held by it."""
        if self.fixed or self.given is None or not any(map(holds_values, pytree.tree_leaves(self.given))):
            return None
        args, kwargs = self.given
        return replace(self, args=args, kwargs=kwargs, fixed=True)

    @property
    def described(self) -> str:
        """The form as text: "(float32[*, 3, 224, 224])"; with the values that are part of it."""
        return describe(self.args, self.kwargs, self.fixed)

    def bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Return a call's arguments in canonical form. Raises InputError where forward doesn't take them."""
        try:
            return canonical_arguments(self.parameters, args, kwargs)
        except TypeError as error:
            raise InputError(f"the model can't be called like this: {error}") from error

    def is_form_of(self, call: Call, any_size: bool = False) -> bool:
        """Return whether a call in canonical form has this form, or differs from it only in the tensors' sizes.

        any_size: whether sizes may differ, and values that are part of the form.

        Raises InputError where values are part of the form and the call is traced, so that it has none.
        """
        mine, my_spec = pytree.tree_flatten((self.args, self.kwargs))
        theirs, their_spec = pytree.tree_flatten(call)
        if my_spec != their_spec:
            return False
        pairs = list(zip(mine, theirs, strict=True))
        alike = all(_same_form(*leaves, any_size) for leaves in pairs)
        return alike and (any_size or not self.fixed or all(_is_same_call(*leaves) for leaves in pairs))

    def takes(self, args: tuple[Any, ...], kwargs: dict[str, Any], any_size: bool = False) -> bool:
        """Return whether a call has this form, or differs from it only in the tensors' sizes where `any_size`."""
        try:
            return self.is_form_of(self.bound(args, kwargs), any_size)
        except InputError:
            return False

    def canonical(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Return a call's arguments in canonical form. Raises InputError where the call has another form."""
        call = self.bound(args, kwargs)
        if not self.is_form_of(call):
            raise InputError(refusal([self], call))
        return call

    def resized(self, call: Call) -> CallSignature:
        """Return the signature of a call that differs from this one only in sizes, with examples of its own.

        They hold no more than two images where each tensor holds as many, so that a large batch isn't kept, and are of
        this signature's dtypes, whatever the call's are under autocast. Where values are part of the form, they are
        the call's own.
        """
        batches = {tensor.shape[0] for tensor in tensors_in(call) if tensor.ndim}
        most = BATCH if len(batches) == 1 else None

        def example(mine: Any, theirs: Any) -> Any:
            if not isinstance(theirs, Tensor):
                return theirs
            if self.fixed:
                return theirs.detach().clone().to(mine.dtype)
            return two_images(theirs.detach()[:most].clone() if theirs.ndim else theirs).to(mine.dtype)

        with torch.inference_mode(False):  # what is made in it can't be traced with gradients
            args, kwargs = pytree.tree_map(example, (self.args, self.kwargs), call)
        return replace(self, args=args, kwargs=kwargs, given=(args, kwargs) if self.fixed else None)


def canonical_arguments(parameters: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Return arguments in canonical form: positional where possible, without those equal to the default, in one order.

    Raises TypeError where the arguments don't fit `parameters`.
    """
    bound = parameters.bind(*args, **kwargs)
    needed = False  # whether a later argument, which can be given by its place alone, needs the earlier ones
    for name in reversed(list(bound.arguments)):
        parameter, value = parameters.parameters[name], bound.arguments[name]
        has_default = parameter.default is not parameter.empty
        if parameter.kind is parameter.VAR_KEYWORD:
            bound.arguments[name] = {key: value[key] for key in sorted(value)}
        elif has_default and not needed and not isinstance(value, Tensor) and is_same(value, parameter.default):
            del bound.arguments[name]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
            needed = True
    return bound.args, bound.kwargs


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in a model's arguments or output, in pytree order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter or buffer, or the CPU where it has none."""
    held = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if held is None else held.device


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """Return the dtype of the model's first floating-point parameter, or None where it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def refusal(forms: Sequence[CallSignature], call: Call) -> str:
    """Return the message for a call that has none of the forms that a model was optimised for."""
    known = " or ".join(form.described for form in forms)
    fixed = any(form.fixed for form in forms)
    if any(map(is_array, pytree.tree_leaves(call))):
        what = "torch.as_tensor makes a tensor of an array"
    elif found := advice((forms[0].args, forms[0].kwargs), call):
        what = found
    elif any(form.is_form_of(call, any_size=True) for form in forms):
        what = (
            "where the model itself takes other sizes (timm's need dynamic_img_size=True), sizes='any' takes any, with "
            "a graph for each, and example_inputs=[…] those that you give"
        )
    else:
        what = "for another, call gtp_fx.optimize(model, example_inputs=…) again with such inputs"
    takes = (
        "the model's forward reads these integers, so a graph is for them and these sizes alone"
        if fixed
        else "a graph accepts any batch size, but only its own form"
    )
    return f"this model was optimised for {known} and called with {describe(*call, fixed)}: {takes}; {what}"


def _same_form(mine: Any, theirs: Any, any_size: bool = False) -> bool:
    """Return whether two leaves differ at most in batch size, values and floating-point dtype, or in all sizes."""
    if isinstance(mine, Tensor) != isinstance(theirs, Tensor):
        return False
    if not isinstance(mine, Tensor):
        return is_same(mine, theirs)
    # Floating-point dtypes may differ: under autocast, or where the weights were replaced by some of another dtype.
    same_kind = mine.dtype == theirs.dtype or (mine.is_floating_point() and theirs.is_floating_point())
    return bool(same_kind and mine.ndim == theirs.ndim and (any_size or mine.shape[1:] == theirs.shape[1:]))


def _is_same_call(mine: Any, theirs: Any) -> bool:
    """Return whether two leaves of one form have the same sizes, and the same values where those are few integers.

    Raises InputError where a value is asked for that isn't known, since the call is traced.
    """
    if not isinstance(mine, Tensor):
        return True
    if mine.shape != theirs.shape or not holds_values(mine):
        return bool(mine.shape == theirs.shape)
    if is_fake(theirs):
        raise InputError(
            f"this model's graph is for {dtype_name(mine)} {mine.tolist()} alone, which is compared at every call, and "
            f"what traces the call doesn't know its values: trace fast.graph_module, which doesn't compare them"
        )
    return bool(mine.tolist() == theirs.tolist())


def two_images(tensor: Tensor) -> Tensor:
    """Repeat an example of one image so that it holds two. Raises CaptureError where it holds none."""
    if tensor.is_nested:
        raise CaptureError("an example input is a nested tensor, whose images differ in size: give a batch of one size")
    if tensor.ndim == 0 or tensor.shape[0] == 0:
        raise CaptureError(
            f"an example input of shape {list(tensor.shape)} holds no image; its first dimension is the batch"
        )
    return tensor if tensor.shape[0] >= BATCH else torch.cat([tensor] * BATCH)
