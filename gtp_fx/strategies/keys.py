"""Keys for registered code: different code has a different key.

So a graph keeps the code that it names, and no cache takes one for the other.
"""

from __future__ import annotations

import hashlib
import sys
import uuid
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from gtp_fx.errors import OptionError

_VALUES: dict[str, Any] = {}
"""Everything ever registered, by keys such as "norm:1f0c2a9b6d3e"."""
_OWN: set[str] = set()
"""Keys of this package's code."""
_OF_ONE_PROCESS: set[str] = set()
"""Keys that are random, so that no other process has them."""


def enter(name: str, value: Any, caller: FrameType) -> str:
    """Register a value and return its new key.

    caller: the frame of the code that registers it.
    """
    code = _code(caller)
    key = f"{name}:{code}"
    if not code or key in _VALUES:  # a cell that runs twice, a loop that makes classes
        key = f"{name}:{uuid.uuid4().hex[:12]}"
        _OF_ONE_PROCESS.add(key)
    elif _is_own(caller):
        _OWN.add(key)
    _VALUES[key] = value
    return key


def lasting(keys: Iterable[str]) -> list[str]:
    """Return the keys by which a file can name a user's code; this package's goes by its version.

    Raises OptionError for code that no other process could recognise.
    """
    found = [key for key in keys if key not in _OWN]
    for key in found:
        if key in _OF_ONE_PROCESS:
            raise OptionError(
                f"{key.partition(':')[0]!r} was registered in a notebook, a function or twice, so no other process can "
                f"tell its code from another's: write it at the top level of a module of its own, and import that"
            )
    return found


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
    """Return 12 hexadecimal digits that identify the caller's code in every process; "" where none can.

    They are a hash of the text of the module and its package, at whose top level the call is. A notebook's cell and a
    function's body have none: a random key is never taken for other code's.
    """
    names, file = caller.f_globals, caller.f_code.co_filename
    if caller.f_code.co_name != "<module>" or file != names.get("__file__") or not Path(file).is_file():
        return ""
    package = sys.modules.get((names.get("__package__") or "").partition(".")[0])
    folders = [Path(__file__).parent] if _is_own(caller) else getattr(package, "__path__", [])
    files = {Path(file), *(found for folder in folders for found in Path(folder).rglob("*.py"))}
    return hashlib.sha256(b"".join(found.read_bytes() for found in sorted(files))).hexdigest()[:12]


def _is_own(caller: FrameType) -> bool:
    return caller.f_globals.get("__package__") == __package__
