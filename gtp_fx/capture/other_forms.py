"""What is said of a call whose tensors aren't those that a model takes: their number of dimensions, order or dtype."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_ABOUT_DTYPES = re.compile(r"dtype|scalar type|Input type")
"""What messages of torch's operators say where operands have different dtypes."""


def advice(mine: Any, theirs: Any) -> str:
    """Return what to do where a call's tensors are almost those of an example; "" where that can't be told.

    mine, theirs: arguments of the same structure.
    """
    for own, other in zip(pytree.tree_leaves(mine), pytree.tree_leaves(theirs), strict=False):
        if not isinstance(own, Tensor) or not isinstance(other, Tensor):
            continue
        if other.ndim == own.ndim - 1 and other.shape == own.shape[1:]:
            return "one image is a batch, too: image[None]"
        if own.ndim == other.ndim == 4 and other.shape[3:] + other.shape[1:3] == own.shape[1:] != other.shape[1:]:
            return "this model takes channels first: images.permute(0, 3, 1, 2)"
        if own.is_floating_point() and not other.is_floating_point() and own.shape[1:] == other.shape[1:]:
            return f"it takes images.to({own.dtype}), scaled and normalised as in training"
    return ""


def said_of_dtypes(error: RuntimeError, call: Any, weights: torch.dtype | None) -> str:
    """Return a message where an operator failed since a call's tensors aren't of the weights' dtype; else ""."""
    held = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    others = [tensor for tensor in held if tensor.dtype != weights]
    if weights is None or not others or not _ABOUT_DTYPES.search(str(error)):
        return ""
    given, device = others[0].dtype, others[0].device.type
    if torch.is_autocast_enabled(device):
        return ""
    ways = [f"give images.to({weights})", f"convert the model, model.to({given})"]
    if given in (torch.bfloat16, torch.float16):
        ways.append(f"call it within torch.autocast({device!r}, {given})")
    return (
        f"this model's weights are {_name(weights)}, and it was called with {_name(given)}{list(others[0].shape)}: "
        f"{', or '.join(ways)}"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
