"""Keys for code that is registered: other code has another key, so that a graph that names one keeps it, and no cache mistakes it."""

from __future__ import annotations

import hashlib
import sys
import uuid
from pathlib import Path
from types import FrameType
from typing import Any

from gtp_fx.errors import OptionError

_VALUES: dict[str, Any] = {}
"""Everything that was ever registered, by keys such as "norm:1f0c2a9b6d3e"."""


def enter(name: str, value: Any, caller: FrameType) -> str:
    """A new value's key. caller: who registers it."""
    key = f"{name}:{_code(caller)}"
    if key in _VALUES:  # a cell that runs twice, a loop that makes classes
        key = f"{name}:{uuid.uuid4().hex[:12]}"
    _VALUES[key] = value
    return key


def entered(key: str) -> Any:
    """What has this key. Raises OptionError where nothing has."""
    if key not in _VALUES:
        name = key.partition(":")[0]
        others = [other for other in _VALUES if other.partition(":")[0] == name] or ["nothing of that name"]
        raise OptionError(
            f"this graph was made with {key!r}, and registered here is {', '.join(others)}: register the same code, or optimize "
            f"the model again"
        )
    return _VALUES[key]


def _code(caller: FrameType) -> str:
    """12 hexadecimal digits: where a module registers, of its and its package's text, and the same in every process.

    Else, from a notebook's cell or inside a function, at random: never taken for other code, and unknown to other processes.
    """
    told, file = caller.f_globals, caller.f_code.co_filename
    if caller.f_code.co_name != "<module>" or file != told.get("__file__") or not Path(file).is_file():
        return uuid.uuid4().hex[:12]
    package = sys.modules.get((told.get("__package__") or "").partition(".")[0])
    folders = [Path(__file__).parent] if told.get("__package__") == __package__ else getattr(package, "__path__", [])
    files = {Path(file), *(found for folder in folders for found in Path(folder).rglob("*.py"))}
    return hashlib.sha256(b"".join(found.read_bytes() for found in sorted(files))).hexdigest()[:12]
