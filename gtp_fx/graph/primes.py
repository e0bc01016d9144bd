"""Primes in place of a captured graph's symbols, so that its sizes are the integers that `gtp_fx.graph.symbols` reads.

Two ways of writing one size give one integer, and sizes that torch doesn't know to be equal give different ones. Where
that can't be had, the graph is refused.
"""

from __future__ import annotations

import math
import sys
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from gtp_fx.errors import CaptureError
from gtp_fx.graph.operators import VIEWS
from gtp_fx.graph.symbols import ATOMS, NUMBERS, SMALLEST, Atom
from gtp_fx.graph.torch_internals import fake_mode, floor_divided, new_fake

_FIRST = 4 * SMALLEST
"""Less than any symbol's prime, so that a quarter of a batch is still a symbolic size."""

_STEP = 5040
"""The primes leave the remainder 1 when divided by this, a multiple of every number up to ten."""

_prime_of: dict[str, int] = {}
"""The prime of each symbol, by the symbol's name."""


def fix_symbols(gm: fx.GraphModule) -> None:
    """Replace every `meta["val"]` of `gm` by a fake value whose symbols are primes, all under one fake mode."""
    primes = Primes(gm.graph, fake_mode())
    values = [node.meta["val"] for node in gm.graph.nodes if "val" in node.meta]
    arguments = (leaf for node in gm.graph.nodes for leaf in pytree.tree_leaves((node.args, node.kwargs)))
    for size in (*_sizes_in(values), *arguments):
        if isinstance(size, int) and size >= SMALLEST:
            NUMBERS.add(size)
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

    def __init__(self, graph: fx.Graph, mode: AbstractContextManager[Any]) -> None:
        self._mode = mode
        self._known: dict[Any, int] = {}
        divisors: dict[Any, int] = {}
        sizes = _sizes_in([node.meta["val"] for node in graph.nodes if "val" in node.meta])
        for expression in dict.fromkeys(size.node.expr for size in sizes if isinstance(size, torch.SymInt)):
            for symbol, divisor in floor_divided(expression):
                divisors[symbol] = math.lcm(divisors.get(symbol, 1), divisor)
        self._divisors = divisors

    def in_place_of_symbols(self, value: Any) -> Any:
        """Return a node's value with primes for symbols; its tensors are fakes of this one's mode.

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
            return new_fake(self._mode, shape, stride, leaf)

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
    if value < SMALLEST:
        if any(int(expression.subs({part: 3 * prime + n for part, prime in primes.items()})) != value for n in (0, 1)):
            raise CaptureError(f"a size of the model is {expression}, by which its batch can't be told from a number")
        return value
    atom = Atom(expression, tuple((part, parts[part]) for part in primes))
    known = ATOMS.setdefault(value, atom)
    if known is not atom and not _are_one_size(known, atom):
        raise CaptureError(
            f"sizes of the model are {known.expression} and {expression}, which can't be told apart before it runs"
        )
    return value


def _are_one_size(a: Atom, b: Atom) -> bool:
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
