"""What this package's operators do, as a part of the keys by which torch keeps compiled code.

Torch looks for compiled code before it opens composite operators, by their names: it would take code that an earlier
version of this package had it compile. So the tag that every key has (`torch.compiler.config.cache_key_tag`, by default
that of TORCH_COMPILE_CACHE_KEY_TAG) ends in a digest of the sources of the operators, of their kernels, and of the
strategies that run within one. A tag that the user has set stays in front of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from importlib.resources import files
from importlib.resources.abc import Traversable

import torch.compiler.config

SOURCES = ("ops", "kernels", "strategies")
"""Folders of this package whose code torch knows by operators' names alone."""


def tag_compiled_code() -> None:
    """Add the digest to torch's tag, once a process."""
    own = f";gtp_fx {digest(_sources())}"
    before: str = torch.compiler.config.cache_key_tag
    if not before.endswith(own):
        torch.compiler.config.cache_key_tag = before + own  # type: ignore[assignment]


def digest(sources: Iterable[Traversable]) -> str:
    """Return a digest of files' names and contents."""
    found = hashlib.sha256()
    for file in sorted(sources, key=lambda file: file.name):
        found.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def _sources() -> list[Traversable]:
    """Return the files of Python code in `SOURCES`."""
    package = files("gtp_fx")
    return [file for folder in SOURCES for file in (package / folder).iterdir() if file.name.endswith(".py")]
