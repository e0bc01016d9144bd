"""Sizes as plain integers, symbolic ones included.

A captured graph has symbolic sizes: a batch B, but also the images of two batches B1 + B2, a batch with a template that
the model keeps, B + 1, or half of one, B // 2. Matching shapes means dividing and comparing products of sizes, which is
exact and fast on integers. So each symbol is replaced by a large prime of its own. An *atom* is a symbol or a sum of
them, whatever isn't a product of smaller sizes; its value at those primes is known from then on. The atoms that a size
is a product of can thus be read off the integer, and an atom is never split: no number divides B + 1, whatever its
value. Running a graph of fake tensors is also several times faster on integers than on symbols.

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

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from gtp_fx.errors import CaptureError
from gtp_fx.graph.operators import VIEWS
from gtp_fx.graph.torch_internals import fake_mode, floor_divided

_SMALLEST = 1_000_000
"""A size from here on is symbolic, unless a captured graph has it as a number."""

_FIRST = 4 * _SMALLEST
"""Less than any symbol's prime, so that a quarter of a batch is still a symbolic size."""

_STEP = 5040
"""The primes leave the remainder 1 when divided by this, a multiple of every number up to ten."""

_OF_DATA = re.compile(r"u\d")
"""Begins the names of symbols that torch makes for what an operator finds, and not for what an input has."""

_prime_of: dict[str, int] = {}
"""The prime of each symbol, by the symbol's name."""


@dataclass(frozen=True)
class _Atom:
    """A size that is no product of smaller ones: a symbol, or a sum of symbols and numbers.

    expression: in symbols that stand for themselves, or for a part of one that is known to be divisible.
    parts: each symbol's divisor, where it stands for a part.
    """

    expression: Any
    parts: tuple[tuple[Any, int], ...]

    def at(self, batch: int) -> int:
        """Return the size where every batch holds `batch` images, or the fewest that it can be divided into."""
        return int(self.expression.subs({symbol: max(1, batch // divisor) for symbol, divisor in self.parts}))


_atoms: dict[int, _Atom] = {}
"""Every atom met so far, by its value at the primes."""

_numbers: set[int] = {sys.maxsize}
"""Integers above the smallest prime that captured graphs have as numbers; a slice's open end is one."""


def fix_symbols(gm: fx.GraphModule) -> None:
    """Replace every `meta["val"]` of `gm` by a fake value whose symbols are primes, all under one fake mode."""
    mode, primes = fake_mode(), Primes(gm.graph)
    values = [node.meta["val"] for node in gm.graph.nodes if "val" in node.meta]
    arguments = (leaf for node in gm.graph.nodes for leaf in pytree.tree_leaves((node.args, node.kwargs)))
    for size in (*_sizes_in(values), *arguments):
        if isinstance(size, int) and size >= _SMALLEST:
            _numbers.add(size)
    with mode:
        for node in gm.graph.nodes:
            if "val" in node.meta:
                node.meta["val"] = primes.in_place_of_symbols(node.meta["val"])


def contradiction(graph: fx.Graph) -> fx.Node | None:
    """Return the first view that has another number of elements than what it is of, by the primes; None where none has.

    Torch may know of two symbols that one size is the other's multiple, by a guard that no symbol was replaced for.
    """
    node: fx.Node
    for node in graph.nodes:
        if node.op == "call_function" and node.target in VIEWS:
            source, result = node.all_input_nodes[0].meta.get("val"), node.meta.get("val")
            if isinstance(source, Tensor) and isinstance(result, Tensor) and source.numel() != result.numel():
                return node
    return None


class Primes:
    """Replaces the symbols in one graph's sizes by primes.

    Where the graph halves a batch, the batch is two of a symbol for the half, so that the halves make up the whole.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._known: dict[Any, int] = {}
        divisors: dict[Any, int] = {}
        sizes = _sizes_in([node.meta["val"] for node in graph.nodes if "val" in node.meta])
        for expression in dict.fromkeys(size.node.expr for size in sizes if isinstance(size, torch.SymInt)):
            for symbol, divisor in floor_divided(expression):
                divisors[symbol] = math.lcm(divisors.get(symbol, 1), divisor)
        self._divisors = divisors

    def in_place_of_symbols(self, value: Any) -> Any:
        """Return a node's value with primes for symbols; its tensors are fakes of the mode that is entered.

        Raises CaptureError where a tensor has more elements, by its primes, than torch counts.
        """

        def fixed(leaf: Any) -> Any:
            if isinstance(leaf, torch.SymInt):
                return self(leaf)
            if not isinstance(leaf, Tensor):
                return leaf
            shape, stride = (tuple(map(self, sizes)) for sizes in (leaf.shape, leaf.stride()))
            if math.prod(shape) * leaf.itemsize > sys.maxsize:
                raise CaptureError(
                    f"a tensor of the model is {list(leaf.shape)}: more of its sizes are known only when it runs "
                    f"(a batch, and what depends on what tensors hold) than gtp_fx can tell apart; where they come "
                    f"from image sizes, mark_dynamic on the batch alone keeps those fixed"
                )
            return torch.empty_strided(shape, stride, dtype=leaf.dtype, device=leaf.device)

        return pytree.tree_map(fixed, value)

    def __call__(self, size: int | torch.SymInt) -> int:
        """Return `size` with each free symbol replaced by its prime."""
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if expression not in self._known:
            self._known[expression] = self._value(expression)
        return self._known[expression]

    def _value(self, expression: Any) -> int:
        import sympy  # takes half a second; by now a capture has imported it

        parts = {}
        for symbol in expression.free_symbols:
            divisor = self._divisors.get(symbol, 1)
            part = symbol if divisor == 1 else sympy.Symbol(f"{symbol}/{divisor}", positive=True, integer=True)
            expression = expression.subs(symbol, divisor * part)
            parts[part] = divisor
        number, factors = sympy.factor_list(expression) if parts else (expression, [])
        if not number.is_Integer:
            number, factors = 1, [(expression, 1)]
        value: int = int(number)
        for factor, power in factors:
            value *= _value_of(factor, parts) ** int(power)
        return value


def _value_of(expression: Any, parts: dict[Any, int]) -> int:
    """Return an atom's value at the primes, and remember it.

    An expression that is the same for other primes is a number. Raises CaptureError where one is not, yet its value is
    no larger than a number may be.
    """
    primes = {part: _prime(str(part)) for part in parts if part in expression.free_symbols}
    value = int(expression.subs(primes))
    if value < _SMALLEST:
        if any(int(expression.subs({part: 3 * prime + n for part, prime in primes.items()})) != value for n in (0, 1)):
            raise CaptureError(f"a size of the model is {expression}, by which its batch can't be told from a number")
        return value
    atom = _Atom(expression, tuple((part, parts[part]) for part in primes))
    known = _atoms.setdefault(value, atom)
    if known is not atom and not _are_one_size(known, atom):
        raise CaptureError(
            f"sizes of the model are {known.expression} and {expression}, which can't be told apart before it runs"
        )
    return value


def _are_one_size(a: _Atom, b: _Atom) -> bool:
    """Return whether two atoms of one value are one size, as both halves of an even batch; the larger of two isn't."""
    both = sorted(dict((*a.parts, *b.parts)), key=lambda part: _prime(str(part)))
    turned = dict(zip(both, [_prime(str(part)) for part in reversed(both)], strict=True))
    alike = a.expression.subs(turned) == b.expression.subs(turned)
    return alike and all(a.at(batch) == b.at(batch) for batch in (2, 6))


def _sizes_in(values: Any) -> list[Any]:
    """Return every size and stride in some values of nodes, ints and symbolic ones."""
    leaves = pytree.tree_leaves(values)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    sizes = [size for tensor in tensors for size in (*tensor.shape, *tensor.stride())]
    return sizes + [leaf for leaf in leaves if isinstance(leaf, torch.SymInt)]


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of a node's value, symbols as primes. The node must be a tensor's."""
    return tuple(node.meta["val"].shape)


def at_batch(size: int, batch: int) -> int:
    """Return `size` in a run of `batch` images: every symbol set to that."""
    number, atoms = _parts(size)
    return number * math.prod(_atom_at(value, batch) for value in atoms.elements())


@functools.cache
def _atom_at(value: int, batch: int) -> int:
    """Return an atom's size, by its value at the primes; an atom stays what it is once it is known."""
    return _atoms[value].at(batch)


def per_image(size: int) -> int:
    """Return `size` at batch 1: every symbol set to one."""
    return at_batch(size, 1)


def is_symbolic(size: int) -> bool:
    """Return whether a size is known only when the graph runs."""
    if size < _SMALLEST or size in _numbers:
        return False
    number, atoms = _parts(size)
    return bool(atoms) or number not in _numbers


def depends_on_data(size: int) -> bool:
    """Return whether a size depends on what tensors hold: how many of them are not zero, say."""
    return is_symbolic(size) and any(
        _OF_DATA.match(str(symbol)) for value in _parts(size)[1] for symbol, _ in _atoms[value].parts
    )


def is_atom(size: int) -> bool:
    """Return whether a size is a symbol or a sum of symbols, no product of smaller sizes."""
    return size in _atoms


def divided(size: int, by: int) -> int | None:
    """Return size / by where that is a whole number whatever the symbols are; None where it isn't.

    A sum can be divided into parts that the graph itself has: (B1 + B2) // 2.
    """
    if by == 0 or size % by:
        return None
    (number, atoms), (divisor, others) = _parts(size), _parts(by)
    if number % divisor == 0 and others <= atoms:
        return size // by
    return size // by if size in _atoms and (by in _atoms or size // by in _atoms) else None


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
    if size >= _SMALLEST and size not in _numbers:
        for value in sorted(_atoms, reverse=True):  # a sum before its half
            while size and size % value == 0:
                size //= value
                atoms[value] += 1
    return size, atoms


def _prime(symbol: str) -> int:
    """Return a symbol's prime: one not taken, where the symbol is new.

    Each is further from the last than that from the one before, so that no small sum of some is a small sum of others.
    All leave the remainder 1, so that two of them together can be halved, and three be divided by three, as the graph
    of a model that does so for batches of one size will.
    """
    if symbol not in _prime_of:
        import sympy  # takes half a second; by now a capture has imported it

        candidate = max(_prime_of.values(), default=_FIRST // _STEP * _STEP + 1) + len(_prime_of) * _STEP
        while candidate in _prime_of.values() or not sympy.isprime(candidate):
            candidate += _STEP
        _prime_of[symbol] = candidate
    return _prime_of[symbol]
