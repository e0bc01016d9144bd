"""What a model's forward changes beside making its output: attributes that it sets, lists that it appends to.

A captured graph holds tensors alone. A map kept for a look at it, or a counter, would silently stay what it was, so a model
that changes such things when it runs is refused by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.utils import _pytree as pytree

from gtp_fx.graphs import ancestors

_VALUES = (int, float, complex, str, bytes)
_OWN = frozenset(vars(nn.Module())) - {"training"}
"""nn.Module's own dictionaries: of parameters and buffers, the graph itself tells the changes."""
_HOOKS = tuple(name for name in vars(nn.Module()) if "hooks" in name and isinstance(vars(nn.Module())[name], dict))
_FLAG = "a flag"
_DEPTH = 4
"""How deep containers within containers are looked into."""


@contextlib.contextmanager
def watched(model: nn.Module) -> Iterator[list[str]]:
    """Attributes of modules in `model` that a forward within the context changes, by path. All are put back as they were.

    Put back and not told of is what a model does once, at its first call: flags (True, False, None), and tensors that don't
    come from its inputs (caches). Looked at where forward ends: torch.export undoes a part of it before it returns.
    """
    hooks = {module: {name: dict(vars(module)[name] or {}) for name in _HOOKS} for module in model.modules()}
    before = {module: _attributes(module) for module in model.modules()}
    looks = {module: _looks(attributes) for module, attributes in before.items()}
    copies = {module: _copied(attributes) for module, attributes in before.items()}
    paths = {module: name for name, module in model.named_modules()}
    changed: dict[str, None] = {}

    def look(_: nn.Module, args: Any, kwargs: Any, __: Any) -> None:
        cached = _Cached(pytree.tree_leaves((args, kwargs)))
        for module, then in looks.items():
            attributes = _attributes(module)
            now = _looks(attributes)
            for name in then | now:
                if then.get(name, _FLAG) != now.get(name, _FLAG) and not cached(
                    copies[module].get(name), attributes.get(name)
                ):
                    changed[".".join(filter(None, (paths[module], name)))] = None

    found: list[str] = []
    handle = model.register_forward_hook(look, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()
        found.extend(changed)
        for module, by_name in hooks.items():
            for name, then in by_name.items():
                if vars(module)[name] is not None:
                    vars(module)[name].clear()
                    vars(module)[name].update(then)
        for module, attributes in before.items():
            for name in _attributes(module).keys() - attributes.keys():
                del module.__dict__[name]
            for name, value in attributes.items():
                _refill(value, copies[module][name])
                module.__dict__[name] = value


class _Cached:
    """Whether what is new in an attribute is tensors alone, none of them computed from the call's inputs."""

    def __init__(self, inputs: list[Any]) -> None:
        self.mode = get_proxy_mode()
        self.inputs = {node for node in map(self._node, inputs) if node is not None}

    def __call__(self, before: Any, after: Any) -> bool:
        old = {id(leaf) for leaf in pytree.tree_leaves(before)}
        new = [leaf for leaf in pytree.tree_leaves(after) if id(leaf) not in old]
        return bool(new) and all(isinstance(leaf, Tensor) and self._constant(leaf) for leaf in new)

    def _constant(self, tensor: Tensor) -> bool:
        node = self._node(tensor)
        return node is not None and not ({node} | ancestors(node)) & self.inputs

    def _node(self, value: Any) -> fx.Node | None:
        """The node of the graph being traced that computes `value`."""
        if self.mode is None or not isinstance(value, Tensor):
            return None
        slot: Any = get_proxy_slot(value, self.mode.tracer, None)
        return None if slot is None else slot.proxy.node


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _OWN}


def _looks(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: _look(value) for name, value in attributes.items()}


def _look(value: Any, depth: int = _DEPTH) -> Any:
    """Equal for a value that nothing has happened to: containers by their items, plain values by what they are."""
    if value is None or isinstance(value, bool):
        return _FLAG
    if isinstance(value, _VALUES):
        return type(value), repr(value)
    if depth and isinstance(value, list | tuple):
        return [_look(item, depth - 1) for item in value]
    if depth and isinstance(value, dict):
        return [(key, _look(item, depth - 1)) for key, item in value.items()]
    if isinstance(value, set):
        return len(value)
    return id(value)


def _copied(value: Any, depth: int = _DEPTH) -> Any:
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
