"""Capture of an `nn.Module` as functional pre-dispatch ATen, in which linear, layer_norm and attention stay whole.

`capture_dynamo` does the same for the graph that `torch.compile` passes to a backend. Both keep the batch symbolic and
give the same operators. ARCHITECTURE.md says why the graph is captured at this level.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.capture.batched_export import batched_program
from gtp_fx.capture.export_errors import explained
from gtp_fx.capture.failed_calls import drop_failed_calls
from gtp_fx.capture.flex_attention import open_flex_attention
from gtp_fx.capture.fused_layers import without_fused_layers
from gtp_fx.capture.hooks import without_user_hooks
from gtp_fx.capture.layers import USED, mark_layers, plain_calls, used_paths
from gtp_fx.capture.mutations import changed_by, mutates, refuse_changes, unread_buffers
from gtp_fx.capture.regions import AUTOCAST, opened, write_out
from gtp_fx.capture.side_effects import Left, left_by_each_call
from gtp_fx.capture.signatures import CallSignature
from gtp_fx.capture.text_models import must_not_write_text
from gtp_fx.capture.turns import tracing
from gtp_fx.capture.vocabulary import open_composites
from gtp_fx.capture.wrapped import what_to_give
from gtp_fx.errors import CaptureError
from gtp_fx.graph import edit
from gtp_fx.graph.primes import fix_symbols
from gtp_fx.graph.torch_internals import (
    OUT_OF_MEMORY,
    brief_notes,
    code_when_called,
    is_fake,
    is_functorch,
    tracing_lock,
    without_failure_logs,
    without_partial_graphs,
)

MADE_FOR = "made_for"
"""Key in a captured graph's `meta`: the call that it is for, where values are part of that."""
NOT_KEPT = "not_kept"
"""Key in a captured graph's `meta`: paths of what forward leaves on its modules, and the graph doesn't."""
_FAILED = " can't be captured: "
WRITTEN = "written"
"""Key in a captured graph's `meta`: paths of all attributes that forward sets, at its first call or at each."""


def capture_module(
    model: nn.Module, signature: CallSignature, training: bool = False, apart: Sequence[str] = ()
) -> fx.GraphModule:
    """Return the graph of `model` called with `signature`, in training or evaluation mode. `model` is not changed.

    signature: where its values are fixed, the graph is for those, and for as many images.
    apart: paths of modules that are in the other mode, each by itself.

    Raises CaptureError where torch.export fails, or where the forward changes the model's state at every call.
    """
    must_not_write_text(model, signature.kwargs)
    with tracing(model):
        return _captured(model, signature, training, apart)


def capture_call(
    model: nn.Module, signature: CallSignature, training: bool = False, apart: Sequence[str] = ()
) -> tuple[fx.GraphModule, CallSignature]:
    """Return what `capture_module` does, and the signature of the calls that the graph is for.

    Where a forward can't be captured otherwise, it is captured for the values of the integers that it is called with,
    and for as many images: the signature is then one with fixed values.

    Raises CaptureError where neither is possible.
    """
    fixed = signature.with_fixed_values()
    try:
        with contextlib.nullcontext() if fixed is None else without_partial_graphs():
            return capture_module(model, signature, training, apart), signature
    except CaptureError as error:
        if fixed is None:
            raise
        try:
            return capture_module(model, fixed, training, apart), fixed
        except CaptureError as second:
            why = str(second).partition(_FAILED)[2] or str(second)  # the values themselves would fill a screen
            if str(error).endswith(why):
                raise error from second
            raise CaptureError(f"{error}\nNor can it be for the values of its integers alone: {why}") from error


@code_when_called()
def _captured(model: nn.Module, signature: CallSignature, training: bool, apart: Sequence[str]) -> fx.GraphModule:
    """Do what `capture_module` does, alone with the model."""
    # Fused layers are only for calls without gradients: with gradients on, and torch's switch off, they stay open.
    with (
        tracing_lock(),
        without_failure_logs(),
        brief_notes(),
        _mode(model, training, apart),
        torch.enable_grad(),
        without_fused_layers(),
        without_user_hooks(model),
    ):
        try:
            with plain_calls(model) as called:
                program, attributes = batched_program(model, signature)
            drop_failed_calls(program.graph)
            # A change at the first call alone (a cache, a flag) is harmless, so the model is run twice and compared.
            call = functools.partial(model, *signature.args, **signature.kwargs)
            left = left_by_each_call(model, call) if attributes else Left()
            touched: set[Any] = set()
            if mutates(program.graph_module) or any(is_functorch(node.target) for node in program.graph.nodes):
                # An empty table: functionalise, decompose nothing. It opens regions, too, but not what they do to
                # gradients, and not to einsums.
                touched = write_out(program.graph_module)
                program = program.run_decompositions({})
            _must_be_runnable(program)
        except (CaptureError, *OUT_OF_MEMORY):
            raise
        except Exception as error:
            given = signature.described
            why = what_to_give(model) or explained(error)
            raise CaptureError(f"{model._get_name()} with {given}{_FAILED}{why}") from error
    # In training mode, statistics are updated for evaluation to read.
    buffers = [] if training else unread_buffers(program)
    changed = [name for name in changed_by(program.graph_signature) if name not in buffers]
    refuse_changes(model._get_name(), [*left.read, *changed])
    with tracing_lock():  # regions and composites are traced as well
        exported = program.module(check_guards=False)
        assert isinstance(exported, fx.GraphModule)
        captured = fx.GraphModule(exported, exported.graph)
        updates = captured.graph.find_nodes(op="call_function", target=aten.copy_.default)
        for node in updates:  # of unread buffers; all other changes are refused or functional
            captured.graph.erase_node(node)
        captured = opened(edit.finish(captured) if updates else captured)
        if touched:
            captured.meta[AUTOCAST] = frozenset({*captured.meta.get(AUTOCAST, ()), *touched})
        captured.meta[MADE_FOR] = signature.described if signature.fixed else ""
        captured.meta[NOT_KEPT] = (*left.unread, *buffers)
        captured.meta[WRITTEN] = tuple(attributes)
        open_composites(captured)
        open_flex_attention(captured)
        fix_symbols(captured)
        mark_layers(captured, model, {module for module, plain in called.items() if plain})
        captured.meta[USED] = used_paths(captured, model, called)
        for node in captured.graph.nodes:  # torch's other notes keep tensors of the tracing alive
            node.meta = {key: value for key, value in node.meta.items() if key in (*edit.META_KEYS, "val", edit.LAYER)}
        return captured


def _must_be_runnable(program: torch.export.ExportedProgram) -> None:
    """Raise CaptureError where tracing has left something that no graph can run: calls of torch.func, fake tensors."""
    left = [str(node.target) for node in program.graph.nodes if is_functorch(node.target)]
    left += [name for name, value in program.constants.items() if is_fake(value)]
    if left:
        raise CaptureError(
            f"torch.export leaves {left[0]} in the graph, which can't run outside of tracing: torch.func (vmap, grad) "
            f"inside a forward has to be written as operators on the batch"
        )


@contextlib.contextmanager
def _mode(model: nn.Module, training: bool, apart: Sequence[str]) -> Iterator[None]:
    """Put every module into one mode within the context, those at some paths into the other, and back afterwards.

    A module without modes stays as it is: torch.export has written the mode into those that it returns.
    """
    before = {module: module.training for module in model.modules()}
    try:
        with contextlib.suppress(NotImplementedError):
            model.train(training)
        for path in apart:
            model.get_submodule(path).training = not training
        yield
    finally:
        for module, mode in before.items():
            module.training = mode
