"""Hooks on a model's modules: which are the user's, and a context in which those don't run.

A graph has no call for most modules, so a hook on one of them would be run once, by tracing, with tensors that have no
numbers, and never again. Other hooks are part of the forward: those of `torch.nn.utils`, which make a weight of its
parts, and those that the model's own library sets, such as transformers' to collect hidden states.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

FORWARD = ("_forward_pre_hooks", "_forward_hooks")
"""nn.Module's dicts of hooks on a forward."""
_OF_TORCH = ("torch.nn.utils.", "torch.ao.")


def _package(name: str) -> str:
    """Return the package that a module is in, by their names; "" for a module in none, such as a script."""
    top = name.partition(".")[0]
    return top if hasattr(sys.modules.get(top), "__path__") else ""


def user_hooks(module: nn.Module) -> dict[str, list[int]]:
    """Return the keys of the user's own forward hooks, by the dict they are in; empty where there are none."""
    found = {}
    for name in FORWARD:
        if keys := [key for key, hook in module.__dict__[name].items() if not _is_part_of(module, hook)]:
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


def _is_part_of(module: nn.Module, hook: Any) -> bool:
    """Return whether a hook is part of a module's forward, since torch's utilities or the module's library set it."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    names = {getattr(getattr(hook, "__func__", hook), "__module__", None) or "", type(hook).__module__}
    own = _package(type(module).__module__)
    return any(f"{name}.".startswith(_OF_TORCH) or (own and _package(name) == own) for name in names)
