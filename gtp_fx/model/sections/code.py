"""The code of a kind of section: compiled at its first use, and again where the compiler assumed too much."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gtp_fx.graph import edit
from gtp_fx.graph.torch_internals import OpenSizes, compile_with_inductor, tracing_lock
from gtp_fx.model.sections.alike import Column, Kind, is_open
from gtp_fx.model.sections.cut import OUTSIDE

Bound = Callable[..., Sequence[Any]]
"""A section's code with the numbers of one section and one run: what its inputs are taken to its outputs by."""


@dataclass
class Code:
    """The code of a kind: compiled for its first section, and again for one that the compiler's assumptions exclude.

    ready: what has been compiled.
    known: which of them serves some sizes.
    """

    kind: Kind
    options: Mapping[str, Any]
    ready: list[_Compiled] = field(default_factory=list)
    known: dict[tuple[int, ...], _Compiled] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Where each number that may vary is found: an input, and which of its sizes and strides. Those of what another
        # section returned are looked at in any case: fakes don't always tell a kernel's strides.
        made = [node.op not in OUTSIDE for node in self.kind.sections[0].inputs]
        self._varying = [
            (i, j)
            for i, columns in enumerate(self.kind.sizes)
            for j, column in enumerate(columns)
            if made[i] or is_open(column)
        ]

    def bound(self, values: list[Any], numbers: tuple[int, ...]) -> Bound:
        """Return what runs a section that has these numbers, on values with the sizes and strides of these."""
        if self.kind.as_it_is:
            forward = self.kind.graph_module.forward
            return _usual(lambda *values: forward(*values, *numbers))
        sizes = tuple(number_at(values[i], j) for i, j in self._varying) + numbers
        function = self.known.get(sizes)
        if function is None:
            with tracing_lock():  # torch traces one thing at a time, and other threads may be compiling other models
                function = self.known.get(sizes) or self._compiled(values, numbers)
                self.known[sizes] = function
        # Else what a decision has of one image tells how many tokens there were, and what follows is compiled anew.
        return _usual(function.bound(values, numbers)) if self.kind.decides else function.bound(values, numbers)

    def _compiled(self, values: list[Any], numbers: tuple[int, ...]) -> _Compiled:
        """Return a compiled function that serves some values, from those there are, or compiled now."""
        for compiled in self.ready:
            if compiled.serves([*values, *numbers]):
                return compiled
        assumed = OpenSizes()
        fakes = [
            assumed.fake(value, _keys(columns)) for value, columns in zip(values, self.kind.sizes, strict=True)
        ] + [assumed.integer(value, column) for value, column in zip(numbers, self.kind.given, strict=True)]
        # Symbols that no integer among the arguments has yet.
        passed = {*self.kind.given, *(columns[0] for columns in self.kind.sizes if len(columns) == 1)}
        sizes = {
            column: (i, j)
            for i, columns in reversed(list(enumerate(self.kind.sizes)))
            for j, column in reversed(list(enumerate(columns)))  # a size rather than a stride, which may be another
            if column not in passed and assumed.has(column)
        }
        fakes += [assumed.integer(number_at(values[i], j), column) for column, (i, j) in sizes.items()]
        with assumed.tracing():
            # The compiler owns, and may rewrite, what it is given.
            graph_module = edit.with_inputs(self.kind.graph_module, [f"size_{k}" for k in range(len(sizes))])
            function = compile_with_inductor(graph_module, fakes, self.options)
        self.ready.append(_Compiled(function, assumed, tuple(sizes.values())))
        return self.ready[-1]


@dataclass(frozen=True)
class _Compiled:
    """A compiled function of a section's inputs and numbers.

    function: takes these, and then every size that it has a symbol for and no argument: compilers' caches know symbols
        by such arguments alone.
    assumed: what it assumes of the open sizes.
    sizes: where those sizes are, as an argument and a place among its sizes and strides.
    """

    function: Callable[..., Any]
    assumed: OpenSizes
    sizes: tuple[tuple[int, int], ...]

    def bound(self, values: Sequence[Any], numbers: tuple[int, ...]) -> Bound:
        """Return it as a function of values with the sizes of these."""
        function, rest = self.function, (*numbers, *self._of([*values, *numbers]))
        return lambda *values: function(*values, *rest)

    def serves(self, values: Sequence[Any]) -> bool:
        """Return whether it gives the right result for other inputs and numbers."""
        return self.assumed.hold_for([*values, *self._of(values)])

    def _of(self, values: Sequence[Any]) -> list[int]:
        return [number_at(values[i], j) for i, j in self.sizes]


def _usual(function: Bound) -> Bound:
    """Return a function whose results are as usual."""
    return lambda *values: [_as_usual(value) for value in function(*values)]


def _as_usual(value: Any) -> Any:
    """Return a contiguous tensor with a contiguous one's strides, also where a size is 1 and its stride means nothing.

    Of one image such a stride tells how many tokens there were before, so each site would get code of its own.
    """
    if isinstance(value, Tensor) and 1 in value.shape and value.is_contiguous():
        return value.view(-1).view(value.shape)
    return value


def _keys(columns: Sequence[Column]) -> list[Column | None]:
    """Return each open number's column, and None for one that is part of the code."""
    return [column if is_open(column) else None for column in columns]


def number_at(value: Any, place: int) -> int:
    """Return a size or, after those, a stride of a tensor; an integer itself."""
    if not isinstance(value, Tensor):
        return int(value)
    return value.shape[place] if place < value.dim() else value.stride(place - value.dim())
