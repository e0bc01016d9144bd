"""Parts of a model that are in a mode of their own: a frozen backbone in eval(), dropout that stays on in evaluation.

A graph is of one mode. Where parts have another mode than the whole, that is a graph of its own, with the same
schedule.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import nn

Part = tuple[str, nn.Module]
"""A module and its path."""


def parts_with_modes(model: nn.Module) -> tuple[Part, ...]:
    """Return the modules inside of a model whose forward may depend on their mode."""
    return tuple((path, module) for path, module in model.named_modules() if path and _may_read(module.__class__))


def parts_apart(parts: Sequence[Part], training: bool) -> tuple[str, ...]:
    """Return the paths of those that aren't in the given mode."""
    return tuple([path for path, module in parts if module.training is not training])


@functools.cache
def _may_read(cls: Any) -> bool:
    """Return whether modules of a class may depend on their mode: others' all may, of torch's those that name it."""
    forward: Any = getattr(cls.forward, "__code__", None)
    return not cls.__module__.startswith("torch.nn.modules.") or forward is None or "training" in forward.co_names
