"""The form of a call, and the operators of a graph, as plain values that JSON can have."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx

from gtp_fx.capture.descriptions import holds_values
from gtp_fx.errors import LoadError, SaveError
from gtp_fx.graph.nodes import operator_name
from gtp_fx.model.saving.tensors import digest_of, form

_VALUES = (bool, int, float, str, type(None))


def to_plain(value: Any, fixed: bool = False) -> Any:
    """Return an example input as plain values: a tensor's shape and dtype, and not its numbers.

    fixed: with the values of few integers, for which a graph may be made.

    Raises SaveError where it holds anything but tensors, plain values, lists, tuples and dicts.
    """
    if type(value) in _VALUES:
        return value
    if isinstance(value, Tensor):
        plain = {"tensor": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
        return plain | {"values": value.tolist()} if fixed and holds_values(value) else plain
    if type(value) in (list, tuple):
        return {type(value).__name__: [to_plain(item, fixed) for item in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: to_plain(item, fixed) for key, item in value.items()}}
    raise SaveError(
        f"the model was optimised for inputs with a {type(value).__name__}, which can't be written down: give "
        f"example_inputs of tensors, numbers, strings, lists, tuples and dicts"
    )


def of_plain(value: Any) -> Any:
    """Return the example that `to_plain` described; its tensors have the values, or are zeros.

    Raises LoadError for anything else.
    """
    match value:
        case {"tensor": str(dtype), "shape": list(shape)} if isinstance(getattr(torch, dtype, None), torch.dtype):
            zeros = torch.zeros(shape, dtype=getattr(torch, dtype))
            return torch.tensor(value["values"], dtype=zeros.dtype).reshape(shape) if "values" in value else zeros
        case {"list": list(items)}:
            return [of_plain(item) for item in items]
        case {"tuple": list(items)}:
            return tuple(of_plain(item) for item in items)
        case {"dict": dict(items)}:
            return {name: of_plain(item) for name, item in items.items()}
        case bool() | int() | float() | str() | None:
            return value
    raise LoadError(f"{value!r} is no example input that save_pretrained writes")


def graph_to_plain(captured: fx.GraphModule, held: Collection[str]) -> dict[str, Any]:
    """Return what a captured graph computes: how often each operator is called, and a digest of all calls in order.

    The digest has the operators' arguments, but no device, and nothing of the weights' numbers.

    held: names of the parameters and buffers, by which the graph reads them. Of its other constants the digest has the
        values, to four digits where they are rounded numbers, which may differ a little elsewhere.
    """
    counts: Counter[str] = Counter()
    digest = hashlib.sha256()
    _digest(captured, held, digest, counts)
    return {"operators": dict(sorted(counts.items())), "digest": digest.hexdigest()}


def _digest(gm: fx.GraphModule, held: Collection[str], digest: Any, counts: Counter[str]) -> None:
    """Add a graph's calls to the digest and to the counts, and those of the graphs that it calls."""
    # What is read has no place of its own in the order, and a trace lists some that nothing uses.
    read = [node for node in gm.graph.find_nodes(op="get_attr") if node.users]
    named = {node: _Named(_read(gm, str(node.target), held, digest, counts)) for node in read}
    for number, node in enumerate(node for node in gm.graph.nodes if node.op != "get_attr"):
        named[node] = _Named(f"%{number}")
        given: Any = fx.map_arg((node.args, node.kwargs), named.__getitem__)  # type: ignore[arg-type]
        digest.update(f"{node.op} {operator_name(node)} {_spelled(given)}\n".encode())
        if node.op == "call_function":
            counts[operator_name(node)] += 1


def _read(gm: fx.GraphModule, name: str, held: Collection[str], digest: Any, counts: Counter[str]) -> str:
    """Return what stands for a value that a graph reads: a parameter's name, or what a constant is."""
    if name in held:
        return name
    value = attrgetter(name)(gm)
    if isinstance(value, fx.GraphModule):
        _digest(value, held, digest, counts)
        return "graph"
    if not isinstance(value, Tensor):
        return type(value).__name__
    if value.is_meta or not (value.is_floating_point() or value.is_complex()):
        return form(value) if value.is_meta else digest_of(value)
    sizes = value.detach().cpu().abs().double().nan_to_num(nan=1e6, posinf=1e5).reshape(-1)
    return f"{form(value)} {sizes.sum():.4g} {sizes @ torch.arange(1, len(sizes) + 1, dtype=torch.float64):.4g}"


class _Named(str):
    """What a node is called in a digest."""


def _spelled(value: Any) -> str:
    if isinstance(value, _Named):
        return str(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_spelled, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_spelled(value[key])}' for key in sorted(value))}}}"
    return "device" if isinstance(value, torch.device) else repr(value)
