"""When a graph module has its Python code generated: torch does it at once, and again after each change.

A capture makes eight graph modules and the passes twenty. Of these two are called, and users may read two more.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule


class _Puts(threading.local):
    """How many contexts of `code_when_called` a thread is in."""

    off = 0


_HERE, _LOCK = _Puts(), threading.RLock()
_entered = 0
"""How many contexts there are, of all threads."""
_generate = fx.GraphModule.recompile


@contextlib.contextmanager
def code_when_called() -> Iterator[None]:
    """Put off the code of graph modules that this thread makes in this context, until it is called or read.

    So it is for those that torch makes, too, such as the states of a graph in an export. Also a decorator. Public:
    none.
    """
    global _entered
    with _LOCK:
        _entered += 1
        fx.GraphModule.recompile = _recompile  # type: ignore[method-assign, assignment]
    _HERE.off += 1
    try:
        yield
    finally:
        _HERE.off -= 1
        with _LOCK:
            _entered -= 1
            if not _entered:
                fx.GraphModule.recompile = _generate  # type: ignore[method-assign]


def _recompile(self: fx.GraphModule) -> Any:
    """Generate a graph module's code, or make it one that torch generates when it is called or read.

    That is torch's own class for it. A module becomes one when it is made, if its class is the ordinary one.
    """
    if not _HERE.off or "_code" in vars(self) or type(self).__bases__ != (fx.GraphModule,):
        return _generate(self)
    # Each graph module has a class of its own, which holds its `forward`; `copy.deepcopy` knows it by torch's name.
    own: Any = type(_LazyGraphModule.__new__(_LazyGraphModule))
    own.__name__ = type(self).__name__
    self.__class__ = own
    return self.recompile()


def with_code(gm: fx.GraphModule) -> fx.GraphModule:
    """Make a graph module that puts off its code an ordinary one, in place, and return it. Public: none."""
    with _LOCK:
        if isinstance(gm, _LazyGraphModule):
            own: Any = type(fx.GraphModule.__new__(fx.GraphModule))
            own.__name__ = type(gm).__name__
            gm.__class__ = own
            _generate(gm)
    return gm
