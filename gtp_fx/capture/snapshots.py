"""What a module's attributes look like now, to be compared with what they look like later."""

from __future__ import annotations

import types
from typing import Any

from torch import Tensor, nn

DEPTH = 4
"""How deep containers within containers are looked into."""
_VALUES = (int, float, complex, str, bytes, bool, type(None))
_OWN = frozenset(vars(nn.Module())) - {"training"}
"""nn.Module's own dictionaries: of parameters, buffers and modules, and what it keeps house with."""
_WHOLE = (Tensor, nn.Module, type, types.ModuleType)


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """But for its tensors and modules."""
    return {name: value for name, value in vars(module).items() if name not in _OWN}


def snapshot(value: Any, depth: int = DEPTH, objects: bool = False) -> Any:
    """Equal for a value that nothing has happened to: containers by their items, plain values by what they are and their type.

    objects: whether plain objects (a configuration) are looked into as well.
    """
    if isinstance(value, _VALUES):
        return type(value), repr(value)
    if depth and isinstance(value, list | tuple):
        return type(value), [snapshot(item, depth - 1, objects) for item in value]
    if depth and isinstance(value, dict):
        return type(value), [(key, snapshot(item, depth - 1, objects)) for key, item in value.items()]
    if isinstance(value, set | frozenset):
        return type(value), frozenset(value)
    if depth and objects and hasattr(value, "__dict__") and not isinstance(value, _WHOLE) and not callable(value):
        return _Same(value), snapshot(vars(value), depth - 1, objects)
    return _Same(value)


class _Same:
    """Equal to another of the very same object, which it keeps alive, so that its address isn't used again."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]
