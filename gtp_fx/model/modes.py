"""Parts of a model that are in a mode of their own: a frozen backbone in eval(), dropout that stays on in evaluation.

A graph is of one mode. Where parts have another mode than the whole, that is a graph of its own, with the same
schedule.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

Part = tuple[str, nn.Module]
"""A module and its path."""


def parts_with_modes(model: nn.Module, called: Collection[str]) -> tuple[Part, ...]:
    """Return the modules inside of a model whose forward may depend on their mode.

    called: paths of the layers that the graph of the evaluation mode calls: theirs are their own affair.
    """
    inside = tuple(f"{path}." for path in called)
    named = ((path, module) for path, module in model.named_modules() if path and path not in called)
    return tuple(
        (path, module) for path, module in named if _may_read(module.__class__) and not path.startswith(inside)
    )


def parts_apart(parts: Sequence[Part], training: bool) -> tuple[str, ...]:
    """Return the paths of those that aren't in the given mode."""
    return tuple([path for path, module in parts if module.training is not training])


@functools.cache
def _may_read(cls: Any) -> bool:
    """Return whether modules of a class may depend on their mode: others' all may, of torch's those that name it."""
    if not cls.__module__.startswith("torch.nn.modules."):
        return True
    forward: Any = getattr(cls.forward, "__code__", None)
    return forward is None or "training" in forward.co_names
