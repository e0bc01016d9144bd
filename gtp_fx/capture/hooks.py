"""Hooks on a model's modules: which are the user's, and a context in which those don't run.

A graph has no call for most modules, so a hook on one of them would be run once, by tracing, with tensors that have no
numbers, and never again. Other hooks are part of the forward: those of `torch.nn.utils`, which make a weight of its
parts, and those that the model's own library sets, such as transformers' to collect hidden states.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

KINDS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
"""nn.Module's dicts of hooks."""
_OF_TORCH = ("torch.nn.utils.", "torch.ao.")


def _package(name: str) -> str:
    """Return the package that a module is in, by their names; "" for a module in none, such as a script."""
    top = name.partition(".")[0]
    return top if hasattr(sys.modules.get(top), "__path__") else ""


def user_hooks(module: nn.Module) -> dict[str, list[int]]:
    """Return the keys of the user's own hooks, by the dict they are in; empty where there are none."""
    return _hooks(module, lambda hook: not _is_torchs(hook) and not _is_librarys(module, hook))


def added_hooks(module: nn.Module) -> dict[str, list[int]]:
    """Return the keys of hooks that aren't the model's library's: the user's, and those of torch's utilities.

    Where they come after a capture, neither is in its graph.
    """
    return _hooks(module, lambda hook: not _is_librarys(module, hook))


def _hooks(module: nn.Module, is_wanted: Callable[[Any], bool]) -> dict[str, list[int]]:
    found = {name: [key for key, hook in module.__dict__[name].items() if is_wanted(hook)] for name in KINDS}
    return {name: keys for name, keys in found.items() if keys}


@contextlib.contextmanager
def without_user_hooks(model: nn.Module) -> Iterator[None]:
    """Take the user's hooks off every module within the context, and put them back in their order."""
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


def _origins(hook: Any) -> set[str]:
    """Return the names of the modules that a hook's function and class are from."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return {getattr(getattr(hook, "__func__", hook), "__module__", None) or "", type(hook).__module__}


def _is_torchs(hook: Any) -> bool:
    return any(f"{name}.".startswith(_OF_TORCH) for name in _origins(hook))


def _is_librarys(module: nn.Module, hook: Any) -> bool:
    own = _package(type(module).__module__)
    return bool(own) and own != "torch" and own in map(_package, _origins(hook))
