"""Sizes as plain integers, symbolic ones included.

A captured graph has symbolic sizes: a batch B, but also the images of two batches B1 + B2, a batch with a template that
the model keeps, B + 1, or half of one, B // 2. Matching shapes means dividing and comparing products of sizes, which is
exact and fast on integers. So each symbol is replaced by a large prime of its own (`gtp_fx.graph.primes`). An *atom* is
a symbol or a sum of them, whatever isn't a product of smaller sizes; its value at those primes is known from then on.
The atoms that a size is a product of can thus be read off the integer, and an atom is never split: no number divides
B + 1, whatever its value. Running a graph of fake tensors is also several times faster on integers than on symbols.

No real model has a dimension as large as the smallest prime, so an integer above it that no captured graph had as a
number is symbolic too, even if it is no product of known atoms.
"""

from __future__ import annotations

import functools
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

SMALLEST = 1_000_000
"""A size from here on is symbolic, unless a captured graph has it as a number."""

_OF_DATA = re.compile(r"u\d")
"""Begins the names of symbols that torch makes for what an operator finds, and not for what an input has."""


@dataclass(frozen=True)
class Atom:
    """A size that is no product of smaller ones: a symbol, or a sum of symbols and numbers.

    expression: in symbols that stand for themselves, or for a part of one that is known to be divisible.
    parts: each symbol's divisor, where it stands for a part.
    """

    expression: Any
    parts: tuple[tuple[Any, int], ...]

    def at(self, batch: int) -> int:
        """Return the size where every batch holds `batch` images, or the fewest that it can be divided into."""
        return int(self.expression.subs({symbol: max(1, batch // divisor) for symbol, divisor in self.parts}))


ATOMS: dict[int, Atom] = {}
"""Every atom met so far, by its value at the primes."""

NUMBERS: set[int] = {sys.maxsize}
"""Integers above the smallest prime that captured graphs have as numbers; a slice's open end is one."""


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of a node's value, symbols as primes. The node must be a tensor's."""
    return tuple(node.meta["val"].shape)


def at_batch(size: int, batch: int) -> int:
    """Return `size` in a run of `batch` images: every symbol set to that."""
    if size < SMALLEST:
        return size
    number, atoms = _parts(size)
    return number * math.prod(_atom_at(value, batch) for value in atoms.elements())


@functools.cache
def _atom_at(value: int, batch: int) -> int:
    """Return an atom's size, by its value at the primes; an atom stays what it is once it is known."""
    return ATOMS[value].at(batch)


def per_image(size: int) -> int:
    """Return `size` at batch 1: every symbol set to one."""
    return at_batch(size, 1)


def is_symbolic(size: int) -> bool:
    """Return whether a size is known only when the graph runs."""
    if size < SMALLEST or size in NUMBERS:
        return False
    number, atoms = _parts(size)
    return bool(atoms) or number not in NUMBERS


def depends_on_data(size: int) -> bool:
    """Return whether a size depends on what tensors hold: how many of them are not zero, say."""
    return is_symbolic(size) and any(
        _OF_DATA.match(str(symbol)) for value in _parts(size)[1] for symbol, _ in ATOMS[value].parts
    )


def divided(size: int, by: int) -> int | None:
    """Return size / by where that is a whole number whatever the symbols are; None where it isn't.

    A sum can be divided into parts that the graph itself has: (B1 + B2) // 2.
    """
    if by == 0 or size % by:
        return None
    if size < SMALLEST and by < SMALLEST:
        return size // by
    (number, atoms), (divisor, others) = _parts(size), _parts(by)
    if number % divisor == 0 and others <= atoms:
        return size // by
    return size // by if size in ATOMS and (by in ATOMS or size // by in ATOMS) else None


def written(sizes: Iterable[int]) -> list[int]:
    """Return sizes as a reshape may name them: -1 in place of each that is known only when the graph runs."""
    return [-1 if is_symbolic(size) else size for size in sizes]


def names_a_symbol(arguments: Any) -> bool:
    """Return whether a prime, or a sum of primes, is among a node's arguments: a symbol was taken for a number."""
    return any(type(leaf) is int and is_symbolic(leaf) for leaf in pytree.tree_leaves(arguments))


def fixed_symbols(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes with a prime among their arguments: there, a rewrite has taken a symbol for a number."""
    return [node for node in graph.nodes if names_a_symbol((node.args, node.kwargs))]


def _parts(size: int) -> tuple[int, Counter[int]]:
    """Return the number and the atoms, by value, that a size is the product of."""
    atoms: Counter[int] = Counter()
    if size >= SMALLEST and size not in NUMBERS:
        for value in sorted(ATOMS, reverse=True):  # a sum before its half
            while size and size % value == 0:
                size //= value
                atoms[value] += 1
    return size, atoms
