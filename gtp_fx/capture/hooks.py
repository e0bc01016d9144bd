"""Hooks on a model's modules: which are the user's, and a context in which those don't run.

A graph has no call for most modules, so a hook on one of them would be run once, by tracing, with tensors that have no
numbers, and never again. The hooks of `torch.nn.utils` are part of the forward: they make a weight of its parts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

FORWARD = ("_forward_pre_hooks", "_forward_hooks")
"""nn.Module's dicts of hooks on a forward."""
_OF_TORCH = ("torch.nn.utils.", "torch.ao.")


def user_hooks(module: nn.Module) -> dict[str, list[int]]:
    """Return the keys of the user's own forward hooks, by the dict they are in; empty where there are none."""
    found = {}
    for name in FORWARD:
        if keys := [key for key, hook in module.__dict__[name].items() if not _is_torchs(hook)]:
            found[name] = keys
    return found


@contextlib.contextmanager
def without_user_hooks(model: nn.Module) -> Iterator[None]:
    """Take the user's forward hooks off every module within the context, and put them back in their order."""
    taken: list[tuple[dict[int, Any], dict[int, Any]]] = []
    for module in model.modules():
        for name, keys in user_hooks(module).items():
            hooks = module.__dict__[name]
            taken.append((hooks, dict(hooks)))
            for key in keys:
                del hooks[key]
    try:
        yield
    finally:
        for hooks, before in taken:
            hooks.clear()
            hooks.update(before)


def _is_torchs(hook: Any) -> bool:
    function = getattr(hook, "__func__", hook)
    module = getattr(function, "__module__", None) or type(hook).__module__
    return f"{module}.".startswith(_OF_TORCH) or f"{type(hook).__module__}.".startswith(_OF_TORCH)
