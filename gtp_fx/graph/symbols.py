"""Sizes as plain integers, symbolic ones included.

A captured graph has symbolic sizes; the batch is one. Matching shapes means dividing and comparing products of sizes,
which is exact and fast on integers. So each free symbol is replaced by a large prime of its own, and the prime factors
of a size then name its symbols. No real model has a dimension divisible by such a prime. Running a graph of fake
tensors is also several times faster on integers than on symbols.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from gtp_fx.graph.torch_internals import fake_mode

_prime_of: dict[str, int] = {}
"""The prime of each symbol, by the symbol's name."""


def fix_symbols(gm: fx.GraphModule) -> None:
    """Replace every `meta["val"]` of `gm` by a fake value whose symbols are primes, all under one fake mode."""
    mode = fake_mode()

    def fixed(value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            return concrete(value)
        if not isinstance(value, Tensor):
            return value
        shape, stride = concrete_shape(value.shape), concrete_shape(value.stride())
        return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)

    with mode:
        for node in gm.graph.nodes:
            if "val" in node.meta:
                node.meta["val"] = pytree.tree_map(fixed, node.meta["val"])


def concrete(size: int | torch.SymInt) -> int:
    """Return `size` with each free symbol replaced by its prime."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs({symbol: _prime(str(symbol)) for symbol in expression.free_symbols}))


def concrete_shape(sizes: Sequence[int | torch.SymInt]) -> tuple[int, ...]:
    """Return `sizes` with each free symbol replaced by its prime."""
    return tuple(concrete(size) for size in sizes)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of a node's value, symbols as primes. The node must be a tensor's."""
    return tuple(node.meta["val"].shape)


def at_batch(size: int, batch: int) -> int:
    """Return `size` in a run of `batch` images: every symbol set to that."""
    for prime in _prime_of.values():
        while size and size % prime == 0:
            size = size // prime * batch
    return size


def per_image(size: int) -> int:
    """Return `size` at batch 1: every symbol set to one."""
    return at_batch(size, 1)


def is_symbolic(size: int) -> bool:
    """Return whether a size is known only when the graph runs."""
    return per_image(size) != size


def fixed_symbols(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes with a prime among their arguments: there, a rewrite has taken a symbol for a number."""
    return [
        node
        for node in graph.nodes
        if any(isinstance(leaf, int) and is_symbolic(leaf) for leaf in pytree.tree_leaves((node.args, node.kwargs)))
    ]


def _prime(symbol: str) -> int:
    """Return a symbol's prime: the next one not taken, where the symbol is new."""
    if symbol not in _prime_of:
        import sympy  # takes half a second; by now a capture has imported it

        _prime_of[symbol] = int(sympy.nextprime(max(_prime_of.values(), default=1_000_000)))
    return _prime_of[symbol]
