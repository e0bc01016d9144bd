"""Numbers of numpy and torch, taken as Python's: an option is 0.74 whatever computed it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeGuard

import torch


def plain(value: Any) -> Any:
    """Return a number for an array or tensor of one, a list for one of a row; anything else as it is."""
    if isinstance(value, torch.Tensor) or type(value).__module__ == "numpy":
        if value.ndim == 0:
            return value.item()
        return value.tolist() if value.ndim == 1 else value
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


def take_plain_numbers(values: Any) -> None:
    """Replace, in place, a frozen dataclass's fields by `plain` ones."""
    for field in fields(values):
        object.__setattr__(values, field.name, plain(getattr(values, field.name)))


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether a value is a number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)
