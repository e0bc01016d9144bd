"""Running a graph in sections, each by the code of its kind."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from gtp_fx.graph import edit
from gtp_fx.graph.torch_internals import fill_values, folds_weights
from gtp_fx.model.sections.alike import Kind, kinds, numbers_of
from gtp_fx.model.sections.code import Bound, Code, number_at
from gtp_fx.model.sections.cut import can_be_cut, cut
from gtp_fx.model.sections.first_site import like_the_others
from gtp_fx.model.sections.memory_order import in_order
from gtp_fx.model.sections.values import leaves
from gtp_fx.model.sections.writes import writes_in_place


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
    in_order(gm, inputs)
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

    code: Code
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
        codes = {id(kind): Code(kind, options) for kind in found}
        # What tells one run from another: all other sizes of what comes in are the same in each.
        self._varying = [
            (slot, j)
            for node, slot in slots.items()
            if node.op == "placeholder"
            for j, number in enumerate(numbers_of(node))
            if type(number) is not int
        ]
        self._known: dict[tuple[int, ...], list[Bound]] = {}
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
        sizes = tuple(number_at(inputs[slot], j) for slot, j in self._varying)
        # Each section's sizes follow from those, so which code serves it is looked up at the first such run alone.
        known = self._known.get(sizes)
        functions: list[Bound] = [] if known is None else known
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
