"""A few letters that stand for a piece of code: another function or class gives others, the same one the same in every process.

Compilers keep what they have compiled by the graph that they were given, and a graph names a strategy. With these letters
beside the name, a strategy whose code was edited is another one to every cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any


def fingerprint(of: type | FunctionType) -> str:
    """12 hexadecimal digits, from the code of `of` and of whatever functions, classes and plain values of its own package it reads."""
    package = of.__module__.partition(".")[0]
    digest = hashlib.sha256()
    for line in _told(of, package, set()):
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()[:12]


def _told(value: Any, package: str, seen: set[int]) -> Iterator[str]:
    """Everything that `value` is made of, in an order that is the same in every run."""
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    if id(value) in seen:
        return
    if isinstance(value, FunctionType) and _is_of(value, package):
        seen.add(id(value))
        yield from _told_function(value, package, seen)
    elif isinstance(value, type) and _is_of(value, package):
        seen.add(id(value))
        for base in value.__mro__:
            if _is_of(base, package):
                for name, entry in sorted(vars(base).items()):
                    if not name.startswith("__") or name == "__post_init__":
                        yield name
                        yield from _told(entry, package, seen)
    else:
        yield _plain(value)


def _told_function(function: FunctionType, package: str, seen: set[int]) -> Iterator[str]:
    names: list[str] = []
    yield from _told_code(function.__code__, names)
    yield _plain(function.__defaults__)
    yield _plain(function.__kwdefaults__)
    for cell in function.__closure__ or ():
        yield from _told(cell.cell_contents, package, seen)
    for name in names:
        if name in function.__globals__:
            value = function.__globals__[name]
            of_module = [getattr(value, n) for n in names if hasattr(value, n)] if isinstance(value, ModuleType) else []
            for read in [value, *of_module]:
                yield name
                yield from _told(read, package, seen)


def _told_code(code: CodeType, names: list[str]) -> Iterator[str]:
    """names: filled with what the code reads from elsewhere."""
    yield code.co_code.hex()
    yield repr((code.co_names, code.co_varnames, code.co_freevars))
    names += code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _told_code(constant, names)
        else:
            yield _plain(constant)


def _plain(value: Any) -> str:
    """A value as text; of what has no text of its own, its type alone."""
    if isinstance(value, frozenset | set):
        return repr(sorted(map(repr, value)))
    text = repr(value)
    return type(value).__qualname__ if " at 0x" in text or isinstance(value, ModuleType) else text


def _is_of(value: Any, package: str) -> bool:
    return str(getattr(value, "__module__", "")).partition(".")[0] == package
