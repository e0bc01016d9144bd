"""Tracing: Dynamo's graphs as ATen, functions as graphs, errors by which torch asks for another try."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import fx
from torch._logging._internal import trace_structured
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from gtp_fx.graph.torch_internals.values import mode_of

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
"""Errors of a machine that lacks memory, on the host and on a device."""
_FAKES, _SYMBOLS = "torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes"
_EXPORT = "torch.export._trace"
"""Torch's loggers of operators that fail on fakes, of symbolic sizes, and of exports that fail."""


def restarts_dynamo(error: Exception) -> bool:
    """Return whether an error is how a backend asks Dynamo to trace the function again. Public: none."""
    if "torch._dynamo.exc" not in sys.modules:
        return False
    exceptions: Any = sys.modules["torch._dynamo.exc"]
    return isinstance(error, exceptions.RestartAnalysis)


def aot_export(gm: fx.GraphModule, fakes: Sequence[Any]) -> tuple[fx.GraphModule, Any]:
    """Return Dynamo's graph in functional pre-dispatch ATen, and its signature; traced in a tracing context of its own.

    A graph enters and leaves torch.func's levels by calls of its own, so a trace that fails between them leaves some
    open, and Dynamo's guards ask for them. They are closed here.

    Public: `torch.export.export`, which takes modules and not a backend's graphs.
    """
    from torch._C import _functorch
    from torch._functorch.aot_autograd import aot_export_module
    from torch._guards import TracingContext, detect_fake_mode, tracing

    levels = _functorch.get_dynamic_layer_stack_depth()
    try:
        with tracing(TracingContext(detect_fake_mode(list(fakes)))), torch.no_grad():
            exported, signature = aot_export_module(gm, fakes, trace_joint=False, pre_dispatch=True, decompositions={})
    finally:
        _functorch.pop_dynamic_layer_stack_and_undo_to_depth(levels)
    return cast("fx.GraphModule", exported), signature


def decomposition_tables() -> tuple[Mapping[Any, Callable[..., Any]], ...]:
    """Return torch's tables of decompositions: torch.export's, then all that torch knows, for what no backend opens.

    Public: the first is `torch.export.default_decompositions`; the second has no public name.
    """
    from torch._decomp import decomposition_table

    return torch.export.default_decompositions(), decomposition_table


def trace_functional(function: Callable[..., Any], values: Sequence[Any]) -> fx.GraphModule | None:
    """Trace a function of fake values as ATen below autograd, where composites are open; sizes stay symbols.

    Return None where the function asks something of a size that isn't known, such as whether a batch is 2: the trace
    would hold for one answer. Public: none.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    fakes = [leaf for leaf in pytree.tree_leaves(list(values)) if isinstance(leaf, FakeTensor)]
    mode = mode_of(fakes[0]) if fakes else contextlib.nullcontext()  # constants that it makes are fakes of this one
    with torch.no_grad(), _quiet(_FAKES, _SYMBOLS), _asking_nothing(fakes) as asked, mode:
        try:
            traced = make_fx(function, tracing_mode="real", _allow_non_fake_inputs=True)(*values)
        except Exception:
            if asked():
                return None
            raise
    return None if asked() else traced


@contextlib.contextmanager
def _asking_nothing(fakes: Sequence[FakeTensor]) -> Iterator[Callable[[], bool]]:
    """Freeze the symbols of fake tensors; yield a function that tells whether anything was asked of them since."""
    environments: Any = [fake.fake_mode.shape_env for fake in fakes if fake.fake_mode.shape_env is not None]
    if not environments:
        yield lambda: False
        return
    environment = environments[0]
    before, frozen = environment.counter["ignored_backward_guard"], environment.frozen
    environment.frozen = True  # questions are counted; later torch also has an error for them
    raising = getattr(environment, "error_on_new_guards", contextlib.nullcontext)
    try:
        with raising():
            yield lambda: environment.counter["ignored_backward_guard"] > before
    finally:
        environment.frozen = frozen


@contextlib.contextmanager
def _quiet(*loggers: str) -> Iterator[None]:
    """Keep some of torch's loggers from logging what fails while something is tried."""
    silenced = [logging.getLogger(name) for name in loggers]
    before = [logger.disabled for logger in silenced]
    for logger in silenced:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, disabled in zip(silenced, before, strict=True):
            logger.disabled = disabled


def is_traced() -> bool:
    """Return whether this thread runs a model in order to trace it.

    Dynamo, which can't follow how tracing is told here, takes the first question for true.

    Public: `torch.compiler.is_compiling`, which is true in every thread while one exports.
    """
    return torch.compiler.is_dynamo_compiling() or (torch.compiler.is_compiling() and _has_proxies())


def _has_proxies() -> bool:
    """Return whether what this thread calls is written into a graph, as it is or below autograd."""
    before = torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch)  # type: ignore[attr-defined]
    return before or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """Compute for real in this context, while this thread traces: no mode sees what is called. Public: none.

    Tensors that are made in it count what is written to them, also in inference mode.
    """
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.inference_mode(False):
        yield


def out_of_sight() -> AbstractContextManager[Any]:
    """Return a context in which modes that watch this thread, such as torch's counter of FLOPs, see nothing.

    A mode may keep operators from being opened, so a model captured under it has another graph. Where this thread
    traces, or computes shapes alone, it hides nothing. Public: none.
    """
    fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    if _has_proxies() or fake is not None:
        return contextlib.nullcontext()
    from torch.utils._python_dispatch import _disable_current_modes

    return cast("AbstractContextManager[Any]", _disable_current_modes())


@contextlib.contextmanager
def without_partial_graphs() -> Iterator[None]:
    """Keep torch.export from printing the graph of a trace that fails, all of a model; what others print stays.

    Public: none.
    """
    told, stream = io.StringIO(), sys.stderr
    graph = ""
    try:
        with contextlib.redirect_stderr(told):
            yield
    except Exception as error:
        failed: BaseException | None = error
        while failed is not None and not graph:
            graph = str(getattr(failed, "partial_fx_graph", ""))
            failed = failed.__cause__
        raise
    finally:
        stream.write(told.getvalue().replace(f"{graph}\n", "") if graph else told.getvalue())


def without_failure_logs() -> AbstractContextManager[None]:
    """Keep out of the log what the error of a trace that fails says: an operator's stack, a page of torch's manual.

    Public: none.
    """
    return _quiet(_FAKES, _EXPORT)


def traced_node(tensor: torch.Tensor) -> tuple[fx.Node, Any] | None:
    """Return the node of a tensor in the graph that is being traced, and the module that holds the graph's constants.

    None where nothing is traced, or the tensor isn't part of it. Public: none.
    """
    from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

    mode: Any = get_proxy_mode()
    held = None if mode is None else get_proxy_slot(tensor, mode.tracer, default=None)
    return None if mode is None or held is None else (held.proxy.node, mode.tracer.root)


def tracing_lock() -> AbstractContextManager[Any]:
    """Return the lock that Dynamo holds when it calls a backend, as a context. Public: none."""
    return cast("AbstractContextManager[Any]", importlib.import_module("torch._dynamo.convert_frame").compile_lock)


def log_artifact(name: str, text: Callable[[], str]) -> None:
    """Put a text into torch's structured trace, for `tlparse`. Public: none."""
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text)
