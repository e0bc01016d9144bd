"""What a forward leaves on its modules, and whether a later call reads it.

A map kept for inspection, a list of intermediate results, a counter: a graph can go without them if no later call
depends on them. That is found out by running the model with something in their place that tells of every use. It may be
computed with and kept again, as `calls += 1` does; where it decides anything, both ways are tried; and where any of it
reaches the output, or the output changes, it is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gtp_fx.graph.nodes import names_in_place

MOST_DECISIONS = 4
"""Decisions of one call that are tried both ways, in 2 ** n calls; beyond them, what decides counts as read."""


class Read(BaseException):
    """Something left by an earlier call is used in a way that can't be followed. No model's `except` catches it."""


@dataclass
class Witness:
    """Answers given to what is decided by values that an earlier call left.

    answers: those to give, in order.
    asked: how many were asked for.
    read: whether a value was used in a way that can't be followed, even where a model caught the error.
    """

    answers: tuple[bool, ...] = ()
    asked: int = 0
    read: bool = False

    def decide(self) -> bool:
        """Return the next answer; False beyond those given."""
        self.asked += 1
        return self.answers[self.asked - 1] if self.asked <= len(self.answers) else False

    def refuse(self, *_: Any, **__: Any) -> Any:
        """Raise Read."""
        self.read = True
        raise Read


class Kept:
    """Stands for a value that an earlier call left. What is computed with it is another one."""

    def __init__(self, witness: Witness) -> None:
        object.__setattr__(self, "_witness", witness)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Kept(self._witness)

    def __setattr__(self, name: str, value: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> Any:
        return Kept(self._witness)

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __delitem__(self, key: Any) -> None:
        pass

    def __bool__(self) -> bool:
        return bool(self._witness.decide())

    def __contains__(self, item: Any) -> bool:
        return bool(self._witness.decide())

    def __repr__(self) -> str:
        return "<kept by an earlier call>"

    def __format__(self, spec: str) -> str:
        return repr(self)

    def _refused(self, *_: Any, **__: Any) -> Any:
        return self._witness.refuse()

    __len__ = __iter__ = __next__ = __index__ = __int__ = __float__ = __complex__ = __hash__ = _refused
    __array__ = _refused

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = pytree.tree_leaves((args, kwargs or {}), is_leaf=lambda leaf: isinstance(leaf, Kept))
        witness = next(leaf._witness for leaf in given if isinstance(leaf, Kept))
        if (names_in_place(getattr(func, "__name__", "")) and not isinstance(args[0], Kept)) or "out" in (kwargs or {}):
            witness.refuse()  # a tensor of this call would hold it
        return Kept(witness)


def _computed(self: Kept, *_: Any) -> Kept:
    return Kept(self._witness)


for _name in (
    *("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"),
    *("divmod", "neg", "pos", "abs", "invert", "eq", "ne", "lt", "le", "gt", "ge", "getitem", "round"),
):
    for _side in ("", "r"):
        setattr(Kept, f"__{_side}{_name}__", _computed)


def is_read(run: Callable[[], Any], install: Callable[[Kept], None], wanted: Any) -> bool:
    """Return whether a model's output depends on values that an earlier call left.

    run: calls the model once, on the same inputs and random numbers each time.
    install: puts a stand-in into the place of the values.
    wanted: the output with the values themselves in place.
    """
    pending: list[tuple[bool, ...]] = [()]
    tried = 0
    while pending:
        witness, tried = Witness(pending.pop()), tried + 1
        install(Kept(witness))
        try:
            output = run()
        except (Exception, Read):  # whatever a model makes of a value that is none
            return True
        if witness.read or tried > 2**MOST_DECISIONS or not same_output(output, wanted):
            return True
        given = witness.answers + (False,) * (witness.asked - len(witness.answers))
        pending += [(*given[:place], True) for place in range(len(witness.answers), witness.asked)]
    return False


def same_output(one: Any, other: Any) -> bool:
    """Return whether two outputs have the same structure and, to rounding, the same numbers."""
    (mine, my_form), (theirs, their_form) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    return my_form == their_form and all(map(_same_leaf, mine, theirs))


def _same_leaf(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.allclose(one, other, equal_nan=True)
    plain = one is None or isinstance(one, str | int | float)
    return type(one) is type(other) and (one == other if plain else not isinstance(one, Kept))
