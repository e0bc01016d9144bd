"""Fake tensors, symbolic sizes, and what is known of a tensor."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


def fake_mode() -> AbstractContextManager[Any]:
    """Return a mode in which tensors have shapes and no numbers.

    Public: none for a mode; only tracing with `torch.export.Dim` makes one.
    """
    return FakeTensorMode()


def new_fake(mode: AbstractContextManager[Any], shape: Sequence[int], stride: Sequence[int], like: Tensor) -> Tensor:
    """Return a tensor without numbers of a mode, which needn't be entered; its dtype and device are those of `like`.

    Public: none; `torch.empty_strided` in the mode, which takes five times as long to find the same by dispatch.
    """
    with torch._C._DisableTorchDispatch():  # whatever mode is entered
        empty = torch.empty_strided(shape, stride, dtype=like.dtype, device="meta")
    return FakeTensor(cast(FakeTensorMode, mode), empty, like.device)


def is_fake(value: Any) -> bool:
    """Return whether a value is a tensor with a shape and no numbers. Public: none."""
    return isinstance(value, FakeTensor)


def mode_of(fake: Tensor) -> AbstractContextManager[Any]:
    """Return the mode that a fake tensor was made in; fakes of different modes don't mix."""
    return cast("AbstractContextManager[Any]", cast(FakeTensor, fake).fake_mode)


def floor_divided(size: Any) -> list[tuple[Any, int]]:
    """Return each symbol that a symbolic size divides by a number, up or down, and the number: (B, 2) for B // 2.

    Public: none.
    """
    from torch.utils._sympy.functions import FloorDiv  # with sympy; a capture has imported it

    quotients = [quotient.args for quotient in size.atoms(FloorDiv) if quotient.args[1].is_Integer]
    # A number is rounded up by adding the divisor less one before.
    wholes = [(part, int(by)) for whole, by in quotients for part in (whole, whole - by + 1)]
    return [(whole, by) for whole, by in wholes if whole.is_Symbol]


def fill_values(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Note every node's value, as fake tensors, where Dynamo hasn't, in the fake mode that its inputs were traced in.

    A backend's inputs may be real tensors, whose sizes tell nothing of symbols; Dynamo's fakes of them, with the
    symbols, are in the placeholders' metadata.

    Public: `torch.fx.passes.fake_tensor_prop`, undocumented.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch._guards import detect_fake_mode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    if all("example_value" in node.meta for node in gm.graph.nodes if node.op != "output"):
        return
    given = [
        node.meta.get("example_value", value)
        for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)
    ]
    modes = [value.fake_mode for value in given if isinstance(value, FakeTensor)]
    mode = modes[0] if modes else detect_fake_mode(list(inputs))
    if mode is None:
        return
    for node in gm.graph.nodes:
        node.meta.pop("val", None)
        if node.op != "placeholder":
            node.meta.pop("example_value", None)
    fakes = [
        mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) and not is_fake(value) else value
        for value in given
    ]
    before, mode.allow_non_fake_inputs = mode.allow_non_fake_inputs, True  # for the graph's own constants
    try:
        with enable_python_dispatcher():  # else composite operators take symbolic sizes for integers, in torch 2.11
            FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*fakes)
    finally:
        mode.allow_non_fake_inputs = before


def open_sizes(tensor: Tensor, dims: Sequence[int]) -> None:
    """Mark sizes of a tensor of which code compiled for it is to take any from two up; compiling raises if it can't.

    Public: `torch._dynamo.mark_dynamic`, itself undocumented but in tutorials.
    """
    importlib.import_module("torch._dynamo").mark_dynamic(tensor, list(dims))


def has_hint(size: Any) -> bool:
    """Return whether a size is known in the first run: not one that depends on the data. Public: none."""
    return not isinstance(size, torch.SymInt) or bool(size.node.has_hint())


def hint(size: Any) -> int:
    """Return a size; of a symbolic one what it is in the first run. Public: none."""
    known: Any = size.node.hint if isinstance(size, torch.SymInt) else size
    return int(known)


def times_written(value: Any) -> int:
    """Return how often a tensor was written to in place since it was made, as far as it counts. Public: none."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0
