"""How an operator is registered: schema from the signature, one composite implementation, and its shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.library import infer_schema

F = TypeVar("F", bound=Callable[..., object])

_library = torch.library.Library("gtp_fx", "DEF")
_shapes: dict[Any, Callable[..., Any]] = {}
_opaque: set[Any] = set()


def operator(shapes: Callable[..., Any], opaque: bool = False) -> Callable[[F], F]:
    """Define `gtp_fx::<function's name>` from the function's annotations, with the function as its composite kernel.

    shapes: empty tensors as the operator would return them. A composite operator needs none to be traced; the verifier,
    which runs every graph on fake tensors after every pass, is spared the operator's inside by it. opaque: what it computes
    is somebody else's to say, so its FLOPs are counted by running it.
    """

    def register(function: F) -> F:
        name = function.__name__
        _library.define(name + infer_schema(function, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, function, "CompositeImplicitAutograd")
        defined = getattr(torch.ops.gtp_fx, name).default
        _shapes[defined] = shapes
        if opaque:
            _opaque.add(defined)
        return function

    return register


def shaped(shapes: Callable[..., Any]) -> Callable[[Any], Any]:
    """The same for an operator that `torch.library` has defined: its shapes, so that the verifier needn't run it."""

    def register(defined: Any) -> Any:
        _shapes[defined._opoverload] = shapes
        return defined

    return register


def shapes_of(target: Any) -> Callable[..., Any] | None:
    """The shape function of one of this package's operators; None for any other."""
    return _shapes.get(target)


def opaque_operators() -> set[Any]:
    """This package's operators whose FLOPs no formula says."""
    return _opaque
