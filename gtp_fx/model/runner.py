"""What runs an optimised graph on one device: its layers called, its operators the processor's, compiled or not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from gtp_fx.capture.layers import OWN_CALLS, USED, layer_paths
from gtp_fx.capture.module import WRITTEN
from gtp_fx.capture.regions import AUTOCAST
from gtp_fx.graph.edit import CONSTANT, share
from gtp_fx.graph.torch_internals import code_when_called, is_traced, with_code
from gtp_fx.model.parameters import lend, top_names
from gtp_fx.model.sections.backend import InSections
from gtp_fx.model.state import Made, Runner, State
from gtp_fx.model.watch import Watch
from gtp_fx.passes.lower.call_layers import call_layers, called_layers, joined_layers
from gtp_fx.passes.lower.functional_linear import call_functional_linear
from gtp_fx.passes.lower.triton_kernels import lowered
from gtp_fx.report.kept_tokens import also_returning_kept


@code_when_called()
def make_runner(
    made: Made, state: State, owner: nn.Module, device: torch.device, inductor: Mapping[str, Any]
) -> Runner:
    """Return what runs a graph over `owner`'s parameters and modules on `device`. Nothing is compiled yet.

    inductor: Inductor's options, where the state asks for compiling.
    """
    options, graph_module = state.options, made.optimised.graph_module
    lend(graph_module, owner, top_names(graph_module))
    if state.compiles:
        graph_module = lowered(graph_module, device, options.disabled_passes, options.target.scale_form)
    graph_module = with_code(call_functional_linear(call_layers(graph_module, owner)))
    share(graph_module, owner)
    _move_constants(graph_module, device)
    # The graph depends on all that it neither calls nor reads. A method's depends on what the method belongs to.
    known, called = made.captured.meta, called_layers(graph_module)
    joined = (joined_layers(graph_module) & layer_paths(made.captured)) - called - known[OWN_CALLS]
    watch = Watch(
        getattr(state.original, "_owner", state.original), called, joined, known[WRITTEN], known[USED], state.taps
    )
    run: Any = graph_module
    if state.compiles:
        if options.shapes == "static":
            run = _Once(torch.compile(graph_module, options=dict(inductor) or None))
        else:
            run = _Once(torch.compile(graph_module, backend=InSections(dict(inductor), options.shapes)))
    return Runner(run, graph_module, top_names(graph_module), watch, frozenset(known.get(AUTOCAST, ())))


def runner_with_kept(
    made: Made, state: State, owner: nn.Module, device: torch.device, inductor: Mapping[str, Any]
) -> Runner:
    """Return what runs a graph as `make_runner`'s does, and returns its output and the `KeptTokens` of it."""
    optimised = made.optimised
    graph, readable = also_returning_kept(optimised.graph_module, optimised.sites, optimised.returned)
    runner = make_runner(
        replace(made, optimised=replace(optimised, graph_module=graph)), state, owner, device, inductor
    )
    return replace(runner, run=readable(runner.run))


class _Once:
    """A compiled function, whose first call of each kind may compile; threads that make one meanwhile wait for it.

    Of a kind are calls with tensors of the same shapes and dtypes, in the same gradient mode.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self._lock = function, threading.RLock()
        self._known: set[Any] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_traced():
            return self._function(*args, **kwargs)
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        kind = (*mode, *((value.shape, value.dtype, value.requires_grad) for value in tensors))
        if kind in self._known:
            return self._function(*args, **kwargs)
        with self._lock:
            result = self._function(*args, **kwargs)
            self._known.add(kind)
        return result


def _move_constants(gm: fx.GraphModule, device: torch.device) -> None:
    """Move the graph's own tensors to the device that its parameters are on; in place."""
    for name, value in vars(gm).items():
        if name.startswith(CONSTANT) and isinstance(value, Tensor) and value.ndim and not value.is_meta:
            gm.__dict__[name] = value.to(device)
