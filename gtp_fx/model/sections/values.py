"""What is known of a node's value before a graph runs: sizes, strides, and the integers that are symbols."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

Number = Hashable
"""An int, or the expression of a symbolic one."""


def value_of(node: fx.Node) -> Any:
    """Return what is known of a node's value: a fake tensor, a symbolic integer, or a structure of those."""
    return node.meta.get("example_value", node.meta.get("val"))


def leaves(values: Any) -> list[Any]:
    """Return the leaves of a node's arguments."""
    return list(pytree.tree_leaves(values))


def number(value: Any) -> Number:
    """Return an integer, or the expression of a symbolic one."""
    return value.node.expr if isinstance(value, torch.SymInt) else int(value)


def lies_in_order(tensor: Tensor) -> bool:
    """Return whether a tensor is strided and contiguous. Unlike torch's answer this holds for any size of a symbol."""
    if tensor.layout is not torch.strided:
        return False
    wanted: Any = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if type(size) is int and size == 1:
            continue
        if number(stride) != wanted:
            return False
        wanted = wanted * number(size)
    return True
