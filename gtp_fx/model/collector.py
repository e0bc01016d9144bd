"""Python's garbage collector, paused while a graph is made.

Capturing and rewriting make hundreds of thousands of objects, nearly all of which are freed as soon as nothing refers
to them. Looking through them meanwhile, and through all that the process has imported, took a fifth of the time.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Keep the collector from running in this context, in every thread; where it was off, it stays off."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
