"""Sizes that are open while a part of a graph is compiled, and the guards that come of it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode


@functools.cache
def _shapes_with_guards_apart() -> Any:
    """Return a ShapeEnv whose guards can be joined by "and" as they are.

    Torch's don't put one of two in parentheses, neither for us nor for the compiler's caches, which join them, too: of
    `a and b or c and d` the second half would do, and code would run on sizes that it wasn't made for. Public: none.
    """
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    class GuardsApart(ShapeEnv):
        def produce_guards(self, *args: Any, **kwargs: Any) -> list[str]:
            return [f"({guard})" for guard in super().produce_guards(*args, **kwargs)]

    return GuardsApart


class OpenSizes:
    """Sizes that a compiled function takes as symbols, and what its compilation came to assume of them.

    Public: `torch._dynamo.mark_dynamic`, for sizes of one function's arguments that nothing relates.
    """

    def __init__(self) -> None:
        # Sizes that happen to be equal aren't the same: another section has others.
        self._shapes = _shapes_with_guards_apart()(duck_shape=False)
        self._mode = FakeTensorMode(shape_env=self._shapes)
        self._symbols: dict[Any, Any] = {}
        self._values: dict[Any, int] = {}
        self._fakes: list[Any] = []
        self._guards: str | None = None

    def integer(self, value: int, key: Any) -> Any:
        """Return a symbolic integer for an argument; one for all arguments, sizes and strides of the same key."""
        from torch._dynamo.source import LocalSource

        fake = self._symbol(value, key, LocalSource(self._argument))
        self._fakes.append(fake)
        return fake

    def fake(self, value: Any, keys: Sequence[Any]) -> Any:
        """Return a fake of an argument, whose sizes and strides are symbolic where they have a key."""
        if not isinstance(value, Tensor):
            return self.integer(value, keys[0])
        if all(key is None for key in keys):
            fake: Tensor = self._mode.from_tensor(value, static_shapes=True)
        else:
            sizes = [
                self._symbol(n, key, self._source("SIZE", dim))
                for dim, (n, key) in enumerate(zip(value.shape, keys[: value.dim()], strict=True))
            ]
            with self._mode:
                fake = torch.empty_strided(
                    sizes, self._strides(value, keys, sizes), dtype=value.dtype, device=value.device
                )
            fake.requires_grad_(value.requires_grad)
        self._fakes.append(fake)
        return fake

    def _strides(self, value: Tensor, keys: Sequence[Any], sizes: Sequence[Any]) -> list[Any]:
        """Return strides as products of sizes, as a contiguous tensor has them; else symbols of their own."""
        found: list[Any] = []
        for dim, (stride, key) in enumerate(zip(value.stride(), keys[value.dim() :], strict=True)):
            order = [(theirs, -d) for d, theirs in enumerate(value.stride())]
            inner = [d for d in range(value.dim()) if order[d] < order[dim]]
            product, number = 1, 1
            for d in inner:
                product, number = product * sizes[d], number * value.shape[d]
            if key is None:
                found.append(stride)
            elif number and stride % number == 0:
                found.append(product * (stride // number))
            else:
                found.append(self._symbol(stride, key, self._source("STRIDE", dim)))
        return found

    @property
    def _argument(self) -> str:
        """Return the next argument's name, as the guards are evaluated with."""
        return f"t{len(self._fakes)}"

    def _source(self, kind: str, dim: int) -> Any:
        from torch._dynamo.source import LocalSource, TensorProperty, TensorPropertySource

        return TensorPropertySource(LocalSource(self._argument), TensorProperty[kind], dim)

    def _symbol(self, value: int, key: Any, source: Any) -> Any:
        """Return a number, or the symbol of its key; `source` is where a guard finds a new one."""
        from torch.fx.experimental.symbolic_shapes import DimDynamic

        # A real stride may differ from what the graph's fakes, and so its key, say: then it is a number.
        if key is None or self._values.setdefault(key, value) != value:
            return value
        for other, symbol in self._symbols.items():
            more = _difference(key, other)
            if more is not None and self._values[other] + more == value:
                return symbol + more if more else symbol
        if key not in self._symbols:
            # A number that is no size, such as a place counted from the end, may be negative.
            create = self._shapes.create_symbol if value > 1 else self._shapes.create_unspecified_symbol
            symbol = create(value, source, dynamic_dim=DimDynamic.DYNAMIC)
            self._symbols[key] = self._shapes.create_symintnode(symbol, hint=value, source=source)
        return self._symbols[key]

    def has(self, key: Any) -> bool:
        """Return whether there is a symbol of a key."""
        return key in self._symbols

    def tracing(self) -> AbstractContextManager[Any]:
        """Return the context in which to compile for these arguments."""
        from torch._guards import TracingContext, tracing

        return tracing(TracingContext(self._mode))

    def hold_for(self, values: Sequence[Any]) -> bool:
        """Return whether other arguments are within what was assumed while compiling."""
        from torch._dynamo.source import LocalSource

        if self._guards is None:
            sources = [LocalSource(f"t{i}") for i in range(len(self._fakes))]
            guards = self._shapes.produce_guards(self._fakes, sources, ignore_static=False)
            # Compiled code is given addresses, so it is the same wherever in its storage a tensor begins.
            self._guards = " and ".join(guard for guard in guards if "storage_offset()" not in guard) or "True"
        return bool(self._shapes.evaluate_guards_expression(self._guards, values))


def _difference(key: Any, other: Any) -> int | None:
    """Return by how much a number is more than another one, where it is so everywhere; None where it isn't.

    key, other: the numbers' values in all places where they are used; other keys tell nothing but what is equal.

    Patches and tokens of a stream differ by its CLS token. As two symbols, the code would be the same in the end, but
    the compiler would have to find out what relates them, and to simplify what it has written until then.
    """
    if key == other:
        return 0
    both = isinstance(key, tuple) and isinstance(other, tuple) and len(key) == len(other)
    if not both or not all(type(value) is int for value in (*key, *other)):
        return None
    found = {mine - theirs for mine, theirs in zip(key, other, strict=True)}
    return found.pop() if len(found) == 1 else None
