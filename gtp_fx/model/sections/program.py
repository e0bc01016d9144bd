"""Running a graph in sections: each kind is compiled at its first use, and serves every section of its kind."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from gtp_fx.graph import edit
from gtp_fx.graph.torch_internals import (
    OpenSizes,
    compile_with_inductor,
    fill_values,
    folds_weights,
    tracing_lock,
)
from gtp_fx.model.sections.alike import Column, Kind, is_open, kinds, numbers_of
from gtp_fx.model.sections.cut import OUTSIDE, can_be_cut, cut, leaves
from gtp_fx.model.sections.first_site import like_the_others
from gtp_fx.model.sections.writes import writes_in_place

_Bound = Callable[..., Sequence[Any]]
"""A section's code with the numbers of one section and one run: what its inputs are taken to its outputs by."""


def compile_in_sections(
    gm: fx.GraphModule, inputs: Sequence[Any], options: Mapping[str, Any], only_where_it_pays: bool = False
) -> Callable[..., Any] | None:
    """Compile a graph that a backend was given, in sections, of which those that are alike share their code.

    inputs: fake tensors and symbolic integers, as Dynamo gives them.
    options: Inductor's.
    only_where_it_pays: keep to what was measured: on a CPU, without gradients or options for Inductor, where sections
        differ in a number, and blocks hold no convolutions.

    Returns None where the graph can't be cut or has no sections that are alike: then nothing is gained.
    """
    if folds_weights():  # then weights are no inputs, and sections of other weights aren't alike
        return None
    if only_where_it_pays and (options or not _is_inference_on_cpu(inputs)):
        return None
    # A copy: what Dynamo noted on the graph is Inductor's, where that compiles it whole.
    gm = edit.copy_of(gm)
    fill_values(gm, inputs)
    if not can_be_cut(gm.graph) or writes_in_place(gm.graph):
        return None
    like_the_others(gm.graph)
    found = kinds(cut(gm.graph))
    if all(len(kind.sections) == 1 for kind in found if not kind.as_it_is):
        return None
    if only_where_it_pays and not _pay(found):
        return None
    return Program(gm, found, options)


def _is_inference_on_cpu(inputs: Sequence[Any]) -> bool:
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return not trains and all(tensor.device.type == "cpu" for tensor in tensors)


def _pay(found: Sequence[Kind]) -> bool:
    """Return whether sections differ in a number, else one code serves them whole, and none alike has a convolution."""
    return any(kind.differs for kind in found) and not any(kind.convolves and len(kind.sections) > 1 for kind in found)


@dataclass(frozen=True)
class _Step:
    """A section at work.

    code: of its kind.
    reads, writes: slots of its inputs and outputs.
    numbers: what it gives for its kind's open numbers.
    done: slots that nothing reads any more.
    """

    code: _Code
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    numbers: tuple[int, ...]
    done: tuple[int, ...]


class Program:
    """A graph's sections in order, as a function of its inputs that returns its outputs."""

    def __init__(self, gm: fx.GraphModule, found: Sequence[Kind], options: Mapping[str, Any]) -> None:
        slots: dict[fx.Node, int] = {}
        # Inputs come first, then the tensors that the graph itself holds, what sections return, and constant outputs.
        for op in ("placeholder", "get_attr"):
            for node in gm.graph.nodes:
                if node.op == op:
                    slots[node] = len(slots)
        self._held = [operator.attrgetter(str(node.target))(gm) for node in slots if node.op == "get_attr"]
        place = {node: i for i, node in enumerate(gm.graph.nodes)}
        order = sorted(
            ((part, i, kind) for kind in found for i, part in enumerate(kind.sections)),
            key=lambda at: place[at[0].nodes[0]],
        )
        for part, _, _ in order:
            for output in part.outputs:
                slots[part.nodes[output]] = len(slots)
        (returned,) = gm.graph.find_nodes(op="output")
        outputs = leaves(returned.args[0])
        self._made = len(slots)
        self._constants = [leaf for leaf in outputs if not isinstance(leaf, fx.Node)]
        constant = itertools.count(self._made)
        self._returned = [slots[leaf] if isinstance(leaf, fx.Node) else next(constant) for leaf in outputs]
        codes = {id(kind): _Code(kind, options) for kind in found}
        # What tells one run from another: all other sizes of what comes in are the same in each.
        self._varying = [
            (slot, j)
            for node, slot in slots.items()
            if node.op == "placeholder"
            for j, number in enumerate(numbers_of(node))
            if type(number) is not int
        ]
        self._known: dict[tuple[int, ...], list[_Bound]] = {}
        last = {slots[node]: step for step, (part, _, _) in enumerate(order) for node in part.inputs}
        self._steps = [
            _Step(
                codes[id(kind)],
                tuple(slots[node] for node in part.inputs),
                tuple(slots[part.nodes[output]] for output in part.outputs),
                tuple(int(column[i]) for column in kind.given),  # type: ignore[call-overload]
                tuple({slots[node] for node in part.inputs if last[slots[node]] == step}.difference(self._returned)),
            )
            for step, (part, i, kind) in enumerate(order)
        ]

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        """Run the sections."""
        sizes = tuple(_number_at(inputs[slot], j) for slot, j in self._varying)
        # Each section's sizes follow from those, so which code serves it is looked up at the first such run alone.
        known = self._known.get(sizes)
        functions: list[_Bound] = [] if known is None else known
        values = [*inputs, *self._held]
        values += [None] * (self._made - len(values)) + self._constants
        for i, step in enumerate(self._steps):
            read = [values[slot] for slot in step.reads]
            if known is None:
                functions.append(step.code.bound(read, step.numbers))
            for slot, result in zip(step.writes, functions[i](*read), strict=True):
                values[slot] = result
            for slot in step.done:
                values[slot] = None
        self._known[sizes] = functions
        return tuple(values[slot] for slot in self._returned)


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

    def bound(self, values: Sequence[Any], numbers: tuple[int, ...]) -> _Bound:
        """Return it as a function of values with the sizes of these."""
        function, rest = self.function, (*numbers, *self._of([*values, *numbers]))
        return lambda *values: function(*values, *rest)

    def serves(self, values: Sequence[Any]) -> bool:
        """Return whether it gives the right result for other inputs and numbers."""
        return self.assumed.hold_for([*values, *self._of(values)])

    def _of(self, values: Sequence[Any]) -> list[int]:
        return [_number_at(values[i], j) for i, j in self.sizes]


@dataclass
class _Code:
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

    def bound(self, values: list[Any], numbers: tuple[int, ...]) -> _Bound:
        """Return what runs a section that has these numbers, on values with the sizes and strides of these."""
        if self.kind.as_it_is:
            forward = self.kind.graph_module.forward
            return _usual(lambda *values: forward(*values, *numbers))
        sizes = tuple(_number_at(values[i], j) for i, j in self._varying) + numbers
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
        fakes += [assumed.integer(_number_at(values[i], j), column) for column, (i, j) in sizes.items()]
        with assumed.tracing():
            # The compiler owns, and may rewrite, what it is given.
            graph_module = edit.with_inputs(self.kind.graph_module, [f"size_{k}" for k in range(len(sizes))])
            function = compile_with_inductor(graph_module, fakes, self.options)
        self.ready.append(_Compiled(function, assumed, tuple(sizes.values())))
        return self.ready[-1]


def _usual(function: _Bound) -> _Bound:
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


def _number_at(value: Any, place: int) -> int:
    """Return a size or, after those, a stride of a tensor; an integer itself."""
    if not isinstance(value, Tensor):
        return int(value)
    return value.shape[place] if place < value.dim() else value.stride(place - value.dim())
