"""Turns of threads over one model: while it is traced, nothing that shares its modules runs, and the other way round.

torch.export puts fake tensors in place of a model's parameters while it traces, in the model itself. What `optimize`
returns calls the same modules, so a thread that ran it meanwhile would compute with those.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from torch import nn

Modules = frozenset[int]
"""Identities of a model's modules."""

_CHANGED = threading.Condition()
_RUNNING: dict[int, list[Modules]] = {}
"""By thread, what it runs, innermost last."""
_TRACING: dict[int, list[Modules]] = {}
"""By thread, what it traces, or waits to trace."""


def modules_of(model: nn.Module) -> Modules:
    """Return the identities of a model's modules, itself included."""
    return frozenset(map(id, model.modules()))


@contextlib.contextmanager
def running(modules: Modules) -> Iterator[None]:
    """Run in this context what calls `modules`; waits while another thread traces one of them.

    Nothing waits for a thread that waits for it: a tracing for which this thread's runs have to end, or, where this
    thread is tracing itself, any.
    """
    me = threading.get_ident()
    with _CHANGED:
        if me not in _TRACING:
            mine = frozenset().union(*_RUNNING.get(me, ()))
            _CHANGED.wait_for(lambda: not any(_meet(modules, m) and not _meet(mine, m) for m in _others(_TRACING, me)))
        _enter(_RUNNING, me, modules)
    try:
        yield
    finally:
        _leave(_RUNNING, me)


@contextlib.contextmanager
def tracing(model: nn.Module) -> Iterator[None]:
    """Trace `model` in this context; waits for the runs of other threads that call one of its modules.

    Enter it before torch's lock of compilation, by which tracings take turns: a run that ends first may need that.
    """
    me, modules = threading.get_ident(), modules_of(model)
    with _CHANGED:
        _enter(_TRACING, me, modules)  # no run begins from here on
        _CHANGED.wait_for(lambda: not any(_meet(modules, m) for m in _others(_RUNNING, me)))
    try:
        yield
    finally:
        _leave(_TRACING, me)


def _meet(some: Modules, others: Modules) -> bool:
    return not some.isdisjoint(others)


def _others(entered: dict[int, list[Modules]], me: int) -> Iterator[Modules]:
    return (modules for who, theirs in entered.items() if who != me for modules in theirs)


def _enter(entered: dict[int, list[Modules]], me: int, modules: Modules) -> None:
    entered.setdefault(me, []).append(modules)


def _leave(entered: dict[int, list[Modules]], me: int) -> None:
    with _CHANGED:
        entered[me].pop()
        if not entered[me]:
            del entered[me]
        _CHANGED.notify_all()
