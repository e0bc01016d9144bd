"""Detection of side effects in a model's forward: attributes that it sets, lists that it appends to.

A captured graph only computes tensors. A counter, or an attention map stored for inspection, stops changing. Where a
later call reads what an earlier one left, the model is refused by name; where none does, the report names what isn't
kept any more. A change made only at the first call (a cache, a flag, a corrected size) is no side effect.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gtp_fx.capture.called_as import owner_of
from gtp_fx.capture.kept import Kept, is_read, same_output
from gtp_fx.capture.snapshots import DEPTH, attributes_of, inside, snapshot

_HOOKS = tuple(name for name, value in vars(nn.Module()).items() if "hooks" in name and isinstance(value, dict))


@contextlib.contextmanager
def watched(called: nn.Module) -> Iterator[list[str]]:
    """Collect the paths of the attributes that a forward within the context changes, and restore them afterwards.

    called: the module that is run: a model, or a view of one that runs another function (`CalledAs`).

    The list is filled when the context ends. Attributes are compared in a forward hook, because torch.export undoes
    some changes before it returns.
    """
    changed: dict[str, None] = {}
    found: list[str] = []
    model = owner_of(called)
    with _put_back(model):
        before = _looks(model)
        handle = called.register_forward_hook(lambda *_: changed.update(dict.fromkeys(_differing(model, before))))
        try:
            yield found
        finally:
            handle.remove()
            found.extend(changed)


@dataclass(frozen=True)
class Left:
    """What every call of a forward leaves on its modules: paths of attributes, by whether a later call reads them."""

    read: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()


@torch.no_grad()
def left_by_each_call(model: nn.Module, call: Callable[[], object]) -> Left:
    """Return the attributes that a second run of `call` changes. Restore all state, also random state.

    call: runs `model` once.
    """
    model = owner_of(model)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def run() -> object:
        torch.manual_seed(0)
        return call()

    with _put_back(model), torch.random.fork_rng():
        try:
            first = run()
            after_one = _looks(model)
            second = run()
            changed = _differing(model, after_one)
            places = {path: _place(model, path) for path in changed}
            values = {path: vars(module)[name] for path, (module, name) in places.items() if name in vars(module)}

            def read(*paths: str) -> bool:
                def install(kept: Kept) -> None:
                    for path, (module, name) in places.items():
                        if path in paths or path in values:
                            vars(module)[name] = kept if path in paths else values[path]

                return is_read(run, install, second)

            if not changed:
                return Left()
            if not same_output(first, second):
                return Left(read=tuple(changed))
            if not read(*changed):
                return Left(unread=tuple(changed))
            return Left(read=tuple(path for path in changed if read(path)) or tuple(changed))
        finally:
            for buffer, value in buffers:
                buffer.copy_(value)


def _place(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Return the module that holds an attribute, and the attribute's name."""
    module, _, name = path.rpartition(".")
    return model.get_submodule(module), name


@contextlib.contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Restore every module's attributes and hooks after the context, and the items of lists and dicts in place.

    Those of plain objects that modules hold (a cache of positions, say) as well: what is traced must not stay there.
    """
    hooks = {module: {name: dict(vars(module)[name] or {}) for name in _HOOKS} for module in model.modules()}
    before = {module: attributes_of(module) for module in model.modules()}
    known: set[int] = set()
    values = [value for attributes in before.values() for value in attributes.values()]
    held = [live for value in values for _, live in inside(value, "", known, callables=True)]
    contents = [(live, live.copy()) for live in held]
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
        for live, copy in contents:
            if isinstance(live, list):
                live[:] = copy
            elif live.keys() != copy.keys() or any(live[key] is not item for key, item in copy.items()):
                live.clear()
                live.update(copy)


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
