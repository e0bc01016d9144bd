"""Snapshots of a module's attributes, to be compared with later ones."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

DEPTH = 4
"""Levels of nested containers that a snapshot includes."""
_VALUES = (int, float, complex, str, bytes, bool, type(None))
OWN = frozenset(vars(nn.Module())) - {"training"}
"""Names of nn.Module's internal attributes: parameters, buffers, submodules, hooks."""
_WHOLE = (Tensor, nn.Module, type, types.ModuleType)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """Return the module's attributes by name, without its parameters, buffers and submodules."""
    return {name: value for name, value in vars(module).items() if name not in OWN}


def snapshot(value: Any, depth: int = DEPTH) -> Any:
    """Return a snapshot of `value`. Two snapshots are equal if the value did not change between them.

    Plain values compare by type and value, containers by their items, everything else by identity.

    depth: levels of nested containers to include.
    """
    if isinstance(value, _VALUES):
        return type(value), repr(value)
    if depth and isinstance(value, list | tuple):
        return type(value), [snapshot(item, depth - 1) for item in value]
    if depth and isinstance(value, dict):
        return type(value), [(key, snapshot(item, depth - 1)) for key, item in value.items()]
    if isinstance(value, set | frozenset):
        return type(value), frozenset(value)
    return _Same(value)


def is_same(value: Any, other: Any) -> bool:
    """Return whether both are the same, or equal and of one type. A forward may treat 3, 3.0 and True differently."""
    if value is other or type(value) is not type(other):
        return value is other
    try:
        return bool(value == other)
    except Exception:  # arrays have no one answer, and a user's own class may have none
        return False


def inside(
    value: Any, path: str, known: set[int], depth: int = DEPTH, callables: bool = False
) -> Iterator[tuple[str, Any]]:
    """Yield the dicts and lists in `value`, and the attributes of plain objects such as a configuration, with paths.

    known: ids of what was yielded before, which isn't again; filled. callables: plain objects that can be called are
        looked into as well; functions never are.
    """
    plain = not isinstance(value, (*_VALUES, *_WHOLE, *_FUNCTIONS)) and (callables or not callable(value))
    held = value if isinstance(value, dict | list) else vars(value) if plain and hasattr(value, "__dict__") else None
    if not depth or held is None or id(held) in known:
        return
    known.add(id(held))
    yield path, held
    joint = "." if held is not value else ""
    for key, item in held.items() if isinstance(held, dict) else enumerate(held):
        yield from inside(item, f"{path}{joint}{key}" if joint else f"{path}[{key!r}]", known, depth - 1, callables)


class _Same:
    """Wrapper that compares by identity. It keeps the object alive, so that its address isn't reused."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]
