"""Sections that are alike: the same operators on values of the same form, which differ in nothing but some numbers.

    number    an integer in a node's arguments, a size or stride of a tensor that comes into a section, or an integer
              that comes in: 178, or an expression of the batch where that is open
    column    one number's values in all sections of a kind, in order

A number with the same integer in its whole column is part of the code. Every other is open: what compiles the kind
takes it as a symbol, the same one for equal columns, so that it knows which sizes are equal.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.ops import gtp_fx  # type: ignore[import-not-found]

from gtp_fx.graph.torch_internals import hint
from gtp_fx.model.sections.cut import OUTSIDE, is_free_view, sites
from gtp_fx.model.sections.values import Number, leaves, number, value_of

Column = tuple[Number, ...]

_SMALL = 0.1
"""The part of all values, in bytes, that may be made by sections which aren't compiled since each occurs once."""

_MUCH = 150e6
"""Bytes of all values from which on a site's decision isn't compiled: then calling its many operators is little."""


@dataclass(frozen=True)
class Section:
    """Consecutive nodes of a graph.

    nodes: in order.
    inputs: values of other nodes that they read, in the order of their first use.
    outputs: places in `nodes` of the values that are read outside.
    numbers: the integers in their arguments, in order.
    form: what sections that are alike have in common.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[int, ...]
    numbers: tuple[int, ...]
    form: str

    @property
    def made(self) -> int:
        """Return the bytes of all values, with the sizes of the first run."""
        return sum(hint(value.numel()) * value.element_size() for value in self._tensors)

    @property
    def is_on_cpu(self) -> bool:
        """Return whether all values are in the host's memory."""
        return all(value.device.type == "cpu" for value in self._tensors)

    @property
    def _tensors(self) -> list[Tensor]:
        return [value for node in self.nodes for value in leaves(value_of(node)) if isinstance(value, Tensor)]


@dataclass(frozen=True)
class Kind:
    """Sections that are alike, and one graph for all of them.

    sections: in the graph's order.
    graph_module: takes the inputs, and then each open number of the arguments, once per column; returns the outputs.
    sizes: for each input, the columns of its sizes and strides; for an integer, its own column alone.
    given: the columns of the open numbers that the graph module takes.
    decides: whether it is a site's decision, which tokens leave.
    as_it_is: whether compiling would cost more than it saves: decisions in a long run, views, and what is small and
        single.
    """

    sections: tuple[Section, ...]
    graph_module: fx.GraphModule
    sizes: tuple[tuple[Column, ...], ...]
    given: tuple[Column, ...]
    decides: bool
    as_it_is: bool

    @property
    def differs(self) -> bool:
        """Return whether it has a number that isn't the same in all its sections, known or not."""
        return any(column != column[:1] * len(column) for column in (*self.given, *itertools.chain(*self.sizes)))

    @property
    def convolves(self) -> bool:
        """Return whether it has a convolution, for which Inductor chooses a layout where no size is open."""
        return any("conv" in getattr(node.target, "__name__", "") for node in self.sections[0].nodes)


def section(nodes: Sequence[fx.Node]) -> Section:
    """Describe some consecutive nodes of a graph."""
    place = {node: i for i, node in enumerate(nodes)}
    inputs: dict[fx.Node, int] = {}
    numbers: list[int] = []

    def described(leaf: Any) -> Any:
        if isinstance(leaf, fx.Node):
            return f"%{place[leaf]}" if leaf in place else f"input {inputs.setdefault(leaf, len(inputs))}"
        if type(leaf) is int:
            numbers.append(leaf)
            return "#"
        return repr(leaf)

    calls = [
        (node.op, str(node.target), id(node.target), fx.node.map_aggregate((node.args, node.kwargs), described))
        for node in nodes
    ]
    outputs = tuple(i for i, node in enumerate(nodes) if any(user not in place for user in node.users))
    form = str((calls, outputs, [_form(node) for node in inputs]))
    return Section(tuple(nodes), tuple(inputs), outputs, tuple(numbers), form)


def kinds(parts: Iterable[Sequence[fx.Node]]) -> list[Kind]:
    """Return the sections of a graph by kind."""
    found: dict[str, list[Section]] = {}
    for part in parts:
        described = section(part)
        found.setdefault(described.form, []).append(described)
    made = sum(part.made for alike in found.values() for part in alike)
    small = _small(list(found.values()), _SMALL * made)
    return [_kind(alike, alike[0] in small, made >= _MUCH) for alike in found.values()]


def is_open(column: Column) -> bool:
    """Return whether a number differs among sections, or is known only when the graph runs."""
    return any(type(value) is not int or value != column[0] for value in column)


def _form(node: fx.Node) -> Any:
    """Return what the values of alike sections have in common. Parameters have their sizes, by which layers differ."""
    value = value_of(node)
    if not isinstance(value, Tensor):
        return type(value).__name__
    own = tuple(map(number, value.shape)) if node.op in OUTSIDE else value.dim()
    return str(value.dtype), str(value.device), value.requires_grad, own


def _small(found: Sequence[Sequence[Section]], left: float) -> list[Section]:
    """Return the sections, the smallest that occur once, which together make no more than `left` bytes.

    On a CPU they take some per cent longer without compiling: a norm, a product or an activation is one pass over
    memory in either case. Operators of this package are many of torch's, and gain more. Elsewhere there are none: a GPU
    launches each operator by itself.
    """
    single = [
        alike[0] for alike in found if len(alike) == 1 and alike[0].is_on_cpu and not any(map(_is_many, alike[0].nodes))
    ]
    small = []
    for part in sorted(single, key=lambda part: part.made):
        left -= part.made
        if left < 0:
            break
        small.append(part)
    return small


def _is_many(node: fx.Node) -> bool:
    """Return whether a node calls one of this package's operators that is much work."""
    return getattr(node.target, "namespace", "") == "gtp_fx" and node.target is not gtp_fx.key_bias.default


def _kind(alike: Sequence[Section], small: bool, long: bool) -> Kind:
    """Return the kind of some sections of one form.

    long: whether a run of the whole graph is long.
    """
    first = alike[0]
    sizes = tuple(
        tuple(zip(*(numbers_of(part.inputs[i]) for part in alike), strict=True)) for i in range(len(first.inputs))
    )
    columns: list[Column] = list(zip(*(part.numbers for part in alike), strict=True))
    given = tuple(dict.fromkeys(column for column in columns if is_open(column)))
    decides = bool(sites(first.nodes))
    as_it_is = small or (decides and long) or all(map(is_free_view, first.nodes))
    return Kind(tuple(alike), _graph_module(first, columns, given), sizes, given, decides, as_it_is)


def numbers_of(node: fx.Node) -> tuple[Number, ...]:
    """Return the sizes and then the strides of a node's value; an integer itself."""
    value = value_of(node)
    return tuple(map(number, (*value.shape, *value.stride()) if isinstance(value, Tensor) else (value,)))


def _graph_module(first: Section, columns: Sequence[Column], given: Sequence[Column]) -> fx.GraphModule:
    """Return the graph of a section, with what comes in and the open numbers as its arguments."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {node: graph.placeholder(f"value_{i}") for i, node in enumerate(first.inputs)}
    taken: Mapping[Column, fx.Node] = {column: graph.placeholder(f"number_{i}") for i, column in enumerate(given)}
    remaining = iter(columns)

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, fx.Node):
            return copies[leaf]
        if type(leaf) is int:
            return taken.get(next(remaining), leaf)
        return leaf

    for node in first.nodes:
        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), copied)  # type: ignore[misc]
        copies[node] = graph.create_node(node.op, node.target, args, kwargs)
    graph.output(tuple(copies[first.nodes[i]] for i in first.outputs))
    return fx.GraphModule({}, graph)
