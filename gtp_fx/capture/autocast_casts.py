"""Autocast, written into a graph as the casts that it makes.

Which operators autocast touches, and how, depends on the device and on torch's version. So nothing is listed here: each
operator is run on fake tensors under autocast, and what it comes down to is compared with what it comes down to on
operands that were cast before. Where both are the same, those casts are what autocast means.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.errors import CaptureError
from gtp_fx.graph import edit
from gtp_fx.graph.nodes import layer_name, operator_name, source_line, tensors_of
from gtp_fx.graph.operators import CASTS, COPIES, VIEWS
from gtp_fx.graph.primes import Primes
from gtp_fx.graph.torch_internals import computes, dispatched, fake_mode, mode_of


@dataclass(frozen=True)
class Autocast:
    """State of autocast on one kind of device."""

    enabled: bool
    dtype: torch.dtype


Casts = dict[fx.Node, torch.dtype]
Steps = list[tuple[str, list[torch.dtype]]]
"""What an operator comes down to: operators that compute, and the dtypes of their results."""


_REARRANGING = (*CASTS, *COPIES, *VIEWS)
"""Operators that come to the same before a cast and after it."""


class Caster:
    """Inserts casts into one graph, each once.

    graph: the graph; its nodes have `meta["val"]`.

    touched: states of autocast by device type, of those on which any operator's numbers depend.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._mode = fake_mode()
        self._primes = Primes(graph, self._mode)
        self._made: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        self.touched: set[tuple[str, Autocast]] = set()

    def cast_operands(self, node: fx.Node, autocast: Mapping[str, Autocast]) -> None:
        """Cast a node's operands as autocast would, in place.

        autocast: its state by device type.

        Raises CaptureError where casts of operands don't do what autocast does.
        """
        if not autocast or not computes(node.target):
            return
        device = next((kind for kind in _devices(node) if kind in autocast), None)
        if device is None:
            return
        state = autocast[device]
        try:
            casts = self._casts_of(node, state)
        except CaptureError:
            if state.enabled:
                raise
            casts = {}  # autocast would act here, if it were on
            self.touched.add((device, state))
        if casts:
            self.touched.add((device, state))
        for operand, dtype in casts.items() if state.enabled else ():
            if (operand, dtype) not in self._made:
                self._made[operand, dtype] = self._cast(operand, dtype, before=node)
            node.replace_input_with(operand, self._made[operand, dtype])

    def _casts_of(self, node: fx.Node, state: Autocast) -> Casts:
        """Return the casts of operands that autocast means at a node. Raises CaptureError where none do the same."""
        with self._mode, torch.no_grad():
            fakes: dict[fx.Node, Any] = {n: self._fake(n) for n in node.all_input_nodes if "val" in n.meta}
            with _autocast(state, next(iter(_devices(node)))):
                wanted, calls = self._steps(node, fakes)
            floating = {n: v for n, v in fakes.items() if isinstance(v, Tensor) and _may_be_cast(v)}
            for casts in (
                _first_casts(floating, calls),
                dict.fromkeys(floating, state.dtype),
                dict.fromkeys(floating, torch.float32),
            ):
                casts = {n: dtype for n, dtype in casts.items() if floating[n].dtype != dtype}
                cast = {n: v.to(casts[n]) if n in casts else v for n, v in fakes.items()}
                with contextlib.suppress(RuntimeError, TypeError, ValueError):  # operands of dtypes that don't mix
                    if self._steps(node, cast)[0] == wanted:
                        return casts
        raise CaptureError(
            f"{layer_name(node) or 'the model'} runs {operator_name(node)} under torch.autocast, which changes more in "
            f"it than its operands' dtypes, and a graph has no autocast: call it outside of the autocast, or on "
            f"operands of one dtype [{source_line(node)}]"
        )

    def _steps(self, node: fx.Node, fakes: Mapping[fx.Node, Any]) -> tuple[Steps, list[Any]]:
        """Run a node on fake operands; return what it comes down to, and all calls on the way."""
        target: Any = node.target
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: fakes[n])
        result, calls = dispatched(lambda: target(*args, **kwargs))
        steps = [
            (str(operator), [value.dtype for value in tensors_of(out)])
            for operator, _, out in calls
            if tensors_of(out) and not operator.is_view and operator not in _REARRANGING
        ]
        return [*steps, ("", [value.dtype for value in tensors_of(result)])], calls

    def _fake(self, node: fx.Node) -> Any:
        """Return a node's value in this caster's mode, its symbols as numbers: what is tried sets no guards."""
        return self._primes.in_place_of_symbols(node.meta["val"])

    def _cast(self, operand: fx.Node, dtype: torch.dtype, before: fx.Node) -> fx.Node:
        """Insert a cast before a node."""
        cast = edit.Emitter(self._graph, like=before, before=before)(aten.to.dtype, operand, dtype)
        value = operand.meta["val"]
        with mode_of(value):
            cast.meta["val"] = value.to(dtype)
        return cast


def _devices(node: fx.Node) -> Iterator[str]:
    """Yield the device types of a node's operands."""
    for operand in node.all_input_nodes:
        for value in tensors_of(operand.meta.get("val")):
            yield value.device.type


def _may_be_cast(value: Tensor) -> bool:
    """Return whether autocast casts such a tensor: it leaves float64 and everything without fractions alone."""
    return value.is_floating_point() and value.dtype != torch.float64


def _first_casts(operands: Mapping[fx.Node, Tensor], calls: list[Any]) -> Casts:
    """Return the casts among `calls` of the operands themselves."""
    node_of = {id(value): node for node, value in operands.items()}
    casts: Casts = {}
    for operator, args, result in calls:
        if operator is aten._to_copy.default and id(args[0]) in node_of:
            casts.setdefault(node_of[id(args[0])], result.dtype)
    return casts


@contextlib.contextmanager
def _autocast(state: Autocast, device: str) -> Iterator[None]:
    """Switch autocast on in this thread, also for devices that this machine lacks, for which torch.autocast doesn't."""
    before = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled())
    try:
        _set_autocast(device, True, state.dtype, False)
        yield
    finally:
        _set_autocast(device, *before)


def _set_autocast(device: str, enabled: bool, dtype: torch.dtype, cached: bool) -> None:
    torch.set_autocast_enabled(device, enabled)
    torch.set_autocast_dtype(device, dtype)
    torch.set_autocast_cache_enabled(cached)


def clashes(touched: Iterable[tuple[str, Autocast]]) -> str:
    """Return a message where autocast is on around a graph that was made with another state written out; else ""."""
    for device, state in touched:
        if torch.is_autocast_enabled(device) and state != Autocast(True, torch.get_autocast_dtype(device)):
            inside = f"on with {state.dtype}" if state.enabled else "off"
            return (
                f"this model's forward switches autocast {inside} for a part, which a graph under an outer autocast "
                f"can't: call the model outside of torch.autocast, or put the outer autocast into forward, where it "
                f"becomes part of the graph"
            )
    return ""
