"""Numbers that a forward reads from tensors which depend on no input, while it is traced.

    positions = torch.cartesian_prod(torch.arange(h), torch.arange(w)).expand(batch, -1, 2)
    table = cosines(int(positions.max()) + 1)        # a number for a tracer, too: every image has the same positions

torch.export makes a symbol of whatever is read from a tensor, since its tensors hold no numbers. Here the graph that is
being traced is asked what the tensor was made of. Where that is constants alone, they are computed.

A size that holds the batch isn't known. A tensor with such a size is a set of numbers that is the same for every batch,
as long as it was only repeated, rearranged, changed number by number, or joined; its largest and smallest are known.
Where it is one image's, repeated for every image, so are those of images that are cut out of it: of two batches that
are encoded as one, each has the same positions.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.ops import aten  # type: ignore[import-not-found]
from torch.overrides import TorchFunctionMode

from gtp_fx.graph.nodes import ancestors
from gtp_fx.graph.operators import (
    CASTS,
    CASTS_LIKE,
    COPIES,
    FLATTENINGS,
    NAMED_DIMENSIONS,
    PERMUTATIONS,
    REARRANGED,
    SPLITS,
    SQUEEZES,
    VIEWS,
)
from gtp_fx.graph.torch_internals import is_operator, traced_node, untraced

_FILLED = (aten.zeros.default, aten.ones.default, aten.full.default)
_COUNTED = (aten.arange.default, aten.arange.start, aten.arange.start_step)
_REARRANGED = (
    *VIEWS,
    *FLATTENINGS,
    *SQUEEZES,
    *PERMUTATIONS,
    *COPIES,
    *REARRANGED,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.detach.default,
)
"""Operators whose result holds all numbers of their operand and no others, in any order, once or more."""
_NUMBER_BY_NUMBER = (
    *CASTS,
    *CASTS_LIKE,
    aten.to.dtype_layout,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
)
_JOINED = (aten.cat.default, aten.stack.default)
_OF_DIMENSIONS = (*SPLITS, aten.slice.Tensor, aten.select.int)
"""Operators that cut a part out of a tensor along one dimension."""
_EXTREMES = (aten.max.default, aten.min.default)
_READ: dict[str, Callable[[Any], Any]] = {
    "item": lambda number: number,
    "__int__": int,
    "__index__": int,
    "__float__": float,
    "__bool__": bool,
}
"""Methods by which Python reads a tensor of one number."""


class _NotKnown(Exception):
    """Raised where a tensor depends on an input, on chance, or on something that isn't followed."""


@dataclass(frozen=True)
class _Known:
    """What a tensor holds.

    repeated: `value` is the set of its numbers, in one dimension, whatever the batch is.
    alike: `value` is what each image of the batch, its first dimension, holds: [1, …].
    """

    value: Tensor
    repeated: bool = False
    alike: bool = False


@contextmanager
def known_numbers_read() -> Iterator[None]:
    """Let a forward that is traced read numbers from tensors that depend on no input."""
    with _Reading():
        yield


class _Reading(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        convert = _READ.get(getattr(function, "__name__", ""))
        if convert is not None and args and isinstance(args[0], Tensor):
            number = known_number(args[0])
            if number is not None:
                return convert(number)
        return function(*args, **(kwargs or {}))


def known_number(tensor: Tensor) -> int | float | bool | None:
    """Return the number that a tensor which is being traced holds; None where it isn't known, or isn't one."""
    found = traced_node(tensor)
    if found is None:
        return None
    node, root = found
    made_of: dict[fx.Node, _Known] = {}
    try:
        with untraced(), torch.no_grad():
            known = _known(node, root, made_of)
            if known.repeated or known.value.numel() != 1 or _changed_in_place(made_of, node.graph):
                return None
            number: int | float | bool = known.value.item()
            return number
    except _NotKnown:
        return None


def _known(node: fx.Node, root: Any, made_of: dict[fx.Node, _Known]) -> _Known:
    """Return what a node's tensor holds, and note that and all that it is made of in `made_of`. Raises _NotKnown."""
    if node not in made_of:
        operands = {x: _known(x, root, made_of) for x in node.all_input_nodes if not _is_size(x)}
        made_of[node] = _constant(node, root) if node.op == "get_attr" else _computed(node, operands)
    return made_of[node]


def _constant(node: fx.Node, root: Any) -> _Known:
    value = getattr(root, str(node.target), None)
    if type(value) is not Tensor:  # a parameter may be trained
        raise _NotKnown
    return _Known(value)


def _computed(node: fx.Node, operands: dict[fx.Node, _Known]) -> _Known:
    target = node.target
    if target is operator.getitem and node.args[0] in operands and operands[node.args[0]].alike:  # type: ignore[index]
        return operands[node.args[0]]  # type: ignore[index]
    if node.op != "call_function" or not is_operator(target) or target._schema.is_mutable:
        raise _NotKnown
    sizes = [x for x in node.all_input_nodes if _is_size(x)]
    may_begin, may_have_sizes = target in (*_FILLED, *_COUNTED), target in (*_FILLED, *_REARRANGED)
    if not (operands or may_begin) or (sizes and not may_have_sizes):
        raise _NotKnown
    repeated = bool(sizes) or any(known.repeated for known in operands.values())
    if repeated and operands:
        return _of_images(node, operands) or _of_sets(node, operands)
    if torch.Tag.nondeterministic_seeded in target.tags or target.namespace != "aten":
        raise _NotKnown
    value = _run(node, {**{x: known.value for x, known in operands.items()}, **dict.fromkeys(sizes, 1)})
    return _Known(value.flatten() if repeated else value, repeated)


def _of_images(node: fx.Node, operands: dict[fx.Node, _Known]) -> _Known | None:
    """Return what an operator makes of numbers that are each image's, or begin to be; None where they aren't then."""
    (known, *others), target = operands.values(), node.target
    if others or known.repeated != known.alike:
        return None
    if target is aten.expand.default and not known.alike:
        sizes: Any = node.args[1]
        same_rank = len(sizes) == known.value.dim() and known.value.shape[0] == 1
        if same_rank and isinstance(sizes[0], fx.Node) and all(isinstance(size, int) for size in sizes[1:]):
            return _Known(known.value.expand(1, *sizes[1:]), repeated=True, alike=True)
    if not known.alike or len(node.all_input_nodes) > 1:
        return None
    if target in _OF_DIMENSIONS:
        place = NAMED_DIMENSIONS[target]
        dim: Any = node.args[place] if len(node.args) > place else node.kwargs.get("dim", 0)
        if dim % known.value.dim() == 0:
            return None if target is aten.select.int else known
        return None if target in SPLITS else _Known(_run(node, {node.all_input_nodes[0]: known.value}), True, True)
    if target in (*COPIES, *_NUMBER_BY_NUMBER, aten.detach.default):
        return _Known(_run(node, {node.all_input_nodes[0]: known.value}), True, True)
    return None


def _of_sets(node: fx.Node, operands: dict[fx.Node, _Known]) -> _Known:
    """Return what an operator makes of sets of numbers. Raises _NotKnown where that isn't a set for every batch."""
    values = {x: known.value.flatten() for x, known in operands.items()}
    if node.target in _REARRANGED:
        return _Known(next(iter(values.values())), repeated=True)
    if node.target in _JOINED:
        return _Known(torch.cat([value for value in values.values() if value.numel()]), repeated=True)
    if node.target in _EXTREMES:
        return _Known(_run(node, values))
    if node.target in _NUMBER_BY_NUMBER and len(values) == 1 and len(node.all_input_nodes) == 1:
        return _Known(_run(node, values), repeated=True)
    raise _NotKnown


def _run(node: fx.Node, values: dict[fx.Node, Any]) -> Tensor:
    target: Any = node.target
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    try:
        result = target(*args, **kwargs)
    except Exception as error:  # whatever an operator raises for sizes that aren't those of the trace
        raise _NotKnown from error
    if not isinstance(result, Tensor):
        raise _NotKnown
    return result


def _is_size(node: fx.Node) -> bool:
    """Return whether a node is a batch, a number times one, or several, which is at least one."""
    if node.target is aten.sym_size.int:
        source: Any = node.args[0]
        given = source.args[0] if source.target is aten.cat.default else [source]
        return all(tensor.op == "placeholder" for tensor in given)
    if node.target is operator.add:
        return all(isinstance(part, fx.Node) and _is_size(part) for part in node.args)
    return node.target is operator.mul and all(
        _is_size(factor) if isinstance(factor, fx.Node) else isinstance(factor, int) and factor > 0
        for factor in node.args
    )


def _changed_in_place(made_of: dict[fx.Node, _Known], graph: fx.Graph) -> bool:
    """Return whether anything was written so far into one of some tensors, or into a view of one."""
    changing = [n for n in graph.nodes if is_operator(n.target) and n.target._schema.is_mutable]
    return any(not made_of.keys().isdisjoint(ancestors(node)) for node in changing)
