"""Keys for registered code: different code has a different key.

So a graph keeps the code that it names, and no cache takes one for the other.
"""

from __future__ import annotations

import hashlib
import sys
import uuid
from pathlib import Path
from types import FrameType
from typing import Any

from gtp_fx.errors import OptionError

_VALUES: dict[str, Any] = {}
"""Everything ever registered, by keys such as "norm:1f0c2a9b6d3e"."""


def enter(name: str, value: Any, caller: FrameType) -> str:
    """Register a value and return its new key.

    caller: the frame of the code that registers it.
    """
    key = f"{name}:{_code(caller)}"
    if key in _VALUES:  # a cell that runs twice, a loop that makes classes
        key = f"{name}:{uuid.uuid4().hex[:12]}"
    _VALUES[key] = value
    return key


def entered(key: str) -> Any:
    """Return the value of a key. Raises OptionError where nothing was registered under it."""
    if key not in _VALUES:
        name = key.partition(":")[0]
        others = [other for other in _VALUES if other.partition(":")[0] == name] or ["nothing of that name"]
        raise OptionError(
            f"this graph was made with {key!r}, and registered here is {', '.join(others)}: register the same code, "
            f"or optimize the model again"
        )
    return _VALUES[key]


def _code(caller: FrameType) -> str:
    """Return 12 hexadecimal digits that identify the caller's code.

    At a module's top level they are a hash of the text of the module and its package, so they are the same in every
    process. Elsewhere (a notebook's cell, a function's body) they are random: never taken for other code, but unknown
    to other processes.
    """
    names, file = caller.f_globals, caller.f_code.co_filename
    if caller.f_code.co_name != "<module>" or file != names.get("__file__") or not Path(file).is_file():
        return uuid.uuid4().hex[:12]
    package = sys.modules.get((names.get("__package__") or "").partition(".")[0])
    folders = [Path(__file__).parent] if names.get("__package__") == __package__ else getattr(package, "__path__", [])
    files = {Path(file), *(found for folder in folders for found in Path(folder).rglob("*.py"))}
    return hashlib.sha256(b"".join(found.read_bytes() for found in sorted(files))).hexdigest()[:12]
