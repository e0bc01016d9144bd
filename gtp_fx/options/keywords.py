"""Keyword arguments that a function doesn't have: the error names the nearest that it has."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable
from typing import ParamSpec, TypeVar

from gtp_fx.errors import OptionError, did_you_mean

P = ParamSpec("P")
R = TypeVar("R")


def keywords_checked(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function that raises OptionError, with the nearest name, for a keyword argument that it doesn't have."""
    known = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        must_be_known(kwargs, known, function.__name__)
        return function(*args, **kwargs)

    return checked


def must_be_known(given: Iterable[str], known: Collection[str], function: str) -> None:
    """Check the names of keyword arguments. Raises OptionError for one that isn't known, with the nearest that is."""
    for name in given:
        if name not in known:
            meant = did_you_mean(name, known) or f": it has {', '.join(known)}"
            raise OptionError(f"{function} has no argument {name!r}{meant}")
