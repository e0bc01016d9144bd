"""What a model's forward changes beside making its output: attributes that it sets, lists that it appends to.

A captured graph holds tensors alone. A map kept for a look at it, or a counter, would silently stay what it was, so a model
that changes such things at every call is refused by name. What it does once, at its first call (a cache, a flag, a size
that it corrects), is no such thing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from gtp_fx.capture.snapshots import DEPTH, attributes_of, snapshot

_HOOKS = tuple(name for name, value in vars(nn.Module()).items() if "hooks" in name and isinstance(value, dict))


@contextlib.contextmanager
def watched(model: nn.Module) -> Iterator[list[str]]:
    """Attributes of modules in `model` that a forward within the context changes, by path. All are put back as they were.

    Looked at where forward ends: torch.export undoes a part of it before it returns.
    """
    changed: dict[str, None] = {}
    found: list[str] = []
    with _put_back(model):
        before = _looks(model)
        handle = model.register_forward_hook(lambda *_: changed.update(dict.fromkeys(_differing(model, before))))
        try:
            yield found
        finally:
            handle.remove()
            found.extend(changed)


@torch.no_grad()
def changed_by_each_call(model: nn.Module, call: Callable[[], object]) -> list[str]:
    """Attributes that a second run of `call`, which runs `model`, changes again; buffers and random state are put back, too."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with _put_back(model), torch.random.fork_rng():
        try:
            call()
            after_one = _looks(model)
            call()
            return _differing(model, after_one)
        finally:
            for buffer, value in buffers:
                buffer.copy_(value)


@contextlib.contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Every module's attributes and hooks as they were, containers with the same items."""
    hooks = {module: {name: dict(vars(module)[name] or {}) for name in _HOOKS} for module in model.modules()}
    before = {module: attributes_of(module) for module in model.modules()}
    copies = {module: _copied(attributes) for module, attributes in before.items()}
    try:
        yield
    finally:
        for module, by_name in hooks.items():
            for name, then in by_name.items():
                if vars(module)[name] is not None:
                    vars(module)[name].clear()
                    vars(module)[name].update(then)
        for module, attributes in before.items():
            for name in attributes_of(module).keys() - attributes.keys():
                del module.__dict__[name]
            for name, value in attributes.items():
                _refill(value, copies[module][name])
                module.__dict__[name] = value


def _looks(model: nn.Module) -> dict[str, Any]:
    """Every attribute of every module by path, with what there is to compare."""
    return {
        ".".join(filter(None, (path, name))): snapshot(value)
        for path, module in model.named_modules()
        for name, value in attributes_of(module).items()
    }


def _differing(model: nn.Module, before: dict[str, Any]) -> list[str]:
    now = _looks(model)
    return [name for name in (before | now) if name not in before or name not in now or before[name] != now[name]]


def _copied(value: Any, depth: int = DEPTH) -> Any:
    if depth and type(value) is list:
        return [_copied(item, depth - 1) for item in value]
    if depth and type(value) is dict:
        return {key: _copied(item, depth - 1) for key, item in value.items()}
    return value


def _refill(value: Any, copy: Any) -> None:
    """Give a list or a dict its items back, the same objects."""
    if value is copy:
        return
    if type(value) is list:
        kept = [_kept(item, old) for item, old in zip(value, copy, strict=False)]
        value[:] = kept + copy[len(kept) :]
    elif type(value) is dict:
        kept_items = {key: _kept(value[key], old) if key in value else old for key, old in copy.items()}
        value.clear()
        value.update(kept_items)


def _kept(item: Any, old: Any) -> Any:
    """`item`, refilled, where it is a container that was here before; else what was."""
    if type(item) is type(old) and type(old) in (list, dict):
        _refill(item, old)
        return item
    return old
