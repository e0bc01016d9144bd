"""Registration of an operator: its schema from the signature, one composite implementation, and its shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.library import infer_schema

F = TypeVar("F", bound=Callable[..., object])

_library = torch.library.Library("gtp_fx", "DEF")
_shapes: dict[Any, Callable[..., Any]] = {}
_flops: dict[Any, Callable[..., int]] = {}
_written: dict[Any, Callable[..., Any]] = {}


def operator(shapes: Callable[..., Any], flops: Callable[..., int] | None = None) -> Callable[[F], F]:
    """Define `gtp_fx::<function's name>` from the function's annotations, with the function as its composite kernel.

    shapes: returns empty tensors like the operator's results. Tracing a composite operator doesn't need it; it lets the
        verifier, which runs every graph on fake tensors after every pass, skip the operator's inside.
    flops: counts a call's FLOPs from its arguments on the meta device, for an operator whose computation a user writes,
        so that no formula knows it.
    """

    def register(function: F) -> F:
        name = function.__name__
        _library.define(name + infer_schema(function, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, function, "CompositeImplicitAutograd")
        defined = getattr(torch.ops.gtp_fx, name).default
        _shapes[defined] = shapes
        _written[defined] = function
        if flops is not None:
            _flops[defined] = flops
        return function

    return register


def shaped(name: str, shapes: Callable[..., Any]) -> Callable[[Any], Any]:
    """Give a kernel's operator, gtp_fx_kernels::`name`, a function of its outputs' shapes.

    So the verifier doesn't have to run it.
    """

    def register(defined: Any) -> Any:
        _shapes[getattr(torch.ops.gtp_fx_kernels, name).default] = shapes
        return defined

    return register


def shapes_of(target: Any) -> Callable[..., Any] | None:
    """Return the shape function of one of this package's operators; None for any other."""
    return _shapes.get(target)


def flops_of(target: Any) -> Callable[..., int] | None:
    """Return the function that counts an operator's FLOPs by running it; None where a formula gives them."""
    return _flops.get(target)


def written_in_aten(target: Any) -> Callable[..., Any] | None:
    """Return the function that one of this package's composite operators is written as; None for any other."""
    return _written.get(target)
