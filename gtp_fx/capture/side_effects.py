"""Detection of side effects in a model's forward: attributes that it sets, lists that it appends to.

A captured graph only computes tensors. A counter, or an attention map stored for inspection, would silently stop
changing, so a model that changes such attributes at every call is refused by name. A change made only at the first call
(a cache, a flag, a corrected size) is accepted.
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
    """Collect the paths of the attributes that a forward within the context changes, and restore them afterwards.

    The list is filled when the context ends. Attributes are compared in a forward hook, because torch.export undoes
    some changes before it returns.
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
    """Return the paths of the attributes that a second run of `call` changes. Restore all state, also random state.

    call: runs `model` once.
    """
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
    """Restore every module's attributes and hooks after the context, and the items of lists and dicts in place."""
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
    """Return a comparable snapshot of every attribute of every module, by path."""
    return {
        ".".join(filter(None, (path, name))): snapshot(value)
        for path, module in model.named_modules()
        for name, value in attributes_of(module).items()
    }


def _differing(model: nn.Module, before: dict[str, Any]) -> list[str]:
    """Return the paths of the attributes that were added, removed or changed since the snapshot `before`."""
    now = _looks(model)
    return [name for name in (before | now) if name not in before or name not in now or before[name] != now[name]]


def _copied(value: Any, depth: int = DEPTH) -> Any:
    """Copy lists and dicts, nested up to `depth`; everything else is returned as it is."""
    if depth and type(value) is list:
        return [_copied(item, depth - 1) for item in value]
    if depth and type(value) is dict:
        return {key: _copied(item, depth - 1) for key, item in value.items()}
    return value


def _refill(value: Any, copy: Any) -> None:
    """Restore the items of a list or dict from its `copy`, in place. The items are the same objects as before."""
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
    """Return `item` with its old items where it is a container of the old one's type, else `old`."""
    if type(item) is type(old) and type(old) in (list, dict):
        _refill(item, old)
        return item
    return old
