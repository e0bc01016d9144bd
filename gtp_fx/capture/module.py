"""Capture of an `nn.Module` as functional pre-dispatch ATen, in which linear, layer_norm and attention stay whole.

`capture_dynamo` does the same for the graph that `torch.compile` passes to a backend. Both keep the batch symbolic and
give the same operators. ARCHITECTURE.md says why the graph is captured at this level.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import inspect
import logging
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.ops import aten  # type: ignore[import-not-found]
from torch.utils import _pytree as pytree

from gtp_fx.capture.called_as import CalledAs
from gtp_fx.capture.failed_calls import drop_failed_calls
from gtp_fx.capture.flex_attention import open_flex_attention
from gtp_fx.capture.fused_layers import without_fused_layers
from gtp_fx.capture.hooks import without_user_hooks
from gtp_fx.capture.known_numbers import known_numbers_read
from gtp_fx.capture.known_values import with_known_values
from gtp_fx.capture.layers import LAYER, USED, mark_layers, plain_calls, used_paths
from gtp_fx.capture.regions import AUTOCAST, opened, write_out
from gtp_fx.capture.side_effects import Left, left_by_each_call, watched
from gtp_fx.capture.signatures import CallSignature
from gtp_fx.capture.turns import tracing
from gtp_fx.capture.vocabulary import open_composites
from gtp_fx.capture.wrapped import what_to_give
from gtp_fx.errors import CaptureError
from gtp_fx.graph import edit
from gtp_fx.graph.nodes import ancestors
from gtp_fx.graph.symbols import fix_symbols
from gtp_fx.graph.torch_internals import (
    OUT_OF_MEMORY,
    is_fake,
    is_functorch,
    tracing_lock,
    without_failure_logs,
    without_partial_graphs,
)

log = logging.getLogger(__name__)

MADE_FOR = "made_for"
"""Key in a captured graph's `meta`: the call that it is for, where values are part of that."""
NOT_KEPT = "not_kept"
"""Key in a captured graph's `meta`: paths of what forward leaves on its modules, and the graph doesn't."""
_WITHOUT_GRADIENTS = ("Inference tensor", "does not support backward")
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
            raise CaptureError(f"{error}\nNor can it be for the values of its integers alone: {second}") from error


def _captured(model: nn.Module, signature: CallSignature, training: bool, apart: Sequence[str]) -> fx.GraphModule:
    """Do what `capture_module` does, alone with the model."""
    # Fused layers are only for calls without gradients: with gradients on, and torch's switch off, they stay open.
    with (
        tracing_lock(),
        without_failure_logs(),
        _mode(model, training, apart),
        torch.enable_grad(),
        without_fused_layers(),
        without_user_hooks(model),
    ):
        try:
            with plain_calls(model) as called:
                program, attributes = _exported(model, signature)
            drop_failed_calls(program.graph)
            # A change at the first call alone (a cache, a flag) is harmless, so the model is run twice and compared.
            call = functools.partial(model, *signature.args, **signature.kwargs)
            left = left_by_each_call(model, call) if attributes else Left()
            touched: set[Any] = set()
            if _mutates(program.graph_module) or any(is_functorch(node.target) for node in program.graph.nodes):
                # An empty table: functionalise, decompose nothing. It opens regions, too, but not what they do to
                # gradients, and not to einsums.
                touched = write_out(program.graph_module)
                program = program.run_decompositions({})
            _must_be_runnable(program)
        except (CaptureError, *OUT_OF_MEMORY):
            raise
        except Exception as error:
            given = signature.described
            why = what_to_give(model) or _explained(error)
            raise CaptureError(f"{model._get_name()} with {given} can't be captured: {why}") from error
    # In training mode, statistics are updated for evaluation to read.
    buffers = [] if training else _unread_buffers(program)
    changed = [name for name in _changed(program.graph_signature) if name not in buffers]
    _refuse_changes(model._get_name(), [*left.read, *changed])
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
            node.meta = {key: value for key, value in node.meta.items() if key in (*edit.META_KEYS, "val", LAYER)}
        return captured


def _unread_buffers(program: torch.export.ExportedProgram) -> list[str]:
    """Return the buffers that a program updates and that none of its results depends on."""
    signature, (output,) = program.graph_signature, program.graph.find_nodes(op="output")
    updates = signature.buffers_to_mutate
    results = [node for node in output.all_input_nodes if node.name not in updates]
    read = {node.name for result in results for node in (result, *ancestors(result))}
    held = {buffer: name for name, buffer in signature.inputs_to_buffers.items()}
    return [buffer for buffer in updates.values() if held[buffer] not in read]


def _exported(model: nn.Module, signature: CallSignature) -> tuple[torch.export.ExportedProgram, list[str]]:
    """Return what `export_batched` does; without gradients where the model only runs so.

    Such are models that hold inference tensors, and flex_attention on a CPU, which is opened and has gradients then.
    """
    try:
        return export_batched(model, signature)
    except RuntimeError as error:
        if not any(reason in str(error) for reason in _WITHOUT_GRADIENTS):
            raise
    with torch.no_grad():
        return export_batched(model, signature)


def _hold_again(exported: fx.GraphModule, gm: fx.GraphModule, held: Mapping[str, str]) -> None:
    """Turn the inputs that AOT made of `gm`'s parameters and buffers back into attributes, in place.

    Inductor's freezing option, for one, only freezes attributes.

    held: names in `gm`, by the inputs' names in `exported`.
    """
    for node in exported.graph.find_nodes(op="placeholder"):
        if node.name in held:
            name = held[node.name]
            setattr(exported, name, getattr(gm, name))
            with exported.graph.inserting_before(node):
                attribute = exported.graph.get_attr(name)
            attribute.meta = node.meta
            edit.replace(node, attribute)
    exported.recompile()


def _changed(signature: Any) -> list[str]:
    """Return the names of the buffers and inputs that an exported graph mutates."""
    return [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]


def _refuse_changes(model: str, changed: Sequence[str]) -> None:
    """Raise CaptureError where `changed` is not empty."""
    if changed:
        raise CaptureError(
            f"{model} changes {', '.join(changed)} when it runs, for its next call or its caller to read, which a "
            f"rewritten graph can't do: remove the change from forward, or optimise the module inside that changes "
            f"nothing (in model.eval() most don't)"
        )


def _explained(error: Exception) -> str:
    """Return a message for an error of torch.export: what went wrong, where, and what to do about it."""
    if _reads_values(error):
        return (
            f"its forward decides by what a tensor holds (an `if`, a loop or a shape that depends on values), and a "
            f"graph has one control flow: {_first_lines(error, 1)}{_where(error)}\nOptimise an inner module that "
            f"doesn't; torch.compile(model, backend='gtp') does so by itself, since Dynamo breaks the graph there"
        )
    if fixed := _fixed_batch(error):
        return (
            f"it works for a batch of {fixed} alone{_where(error)}: its forward has that size written into it, or "
            f"it was exported without dynamic_shapes; take sizes from the input (x.shape[0])"
        )
    return (
        f"{_first_lines(error)}{_where(error)}\nGive example_inputs that the model accepts; torch.export.export(model, "
        f"example_inputs) shows the whole error"
    )


def _reads_values(error: Exception) -> bool:
    """Return whether an error of torch.export says that a forward decides by what a tensor holds."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode  # with sympy; a capture has it

    return isinstance(error, GuardOnDataDependentSymNode) or "data-dependent" in str(error)


def _fixed_batch(error: Exception) -> str:
    """Return the one batch that a model is traceable for, by an error of torch.export; "" where it names none."""
    found = re.search(r"specialized it to be a constant \((\d+)\)", str(error))
    return found[1] if found else ""


def export_batched(
    model: nn.Module, signature: CallSignature, batch: Any = torch.export.Dim.DYNAMIC
) -> tuple[torch.export.ExportedProgram, list[str]]:
    """Export `model` for any batch size. Return the program and the names of the attributes that its forward changes.

    batch: `torch.export.Dim` of every tensor's first dimension. A named one may include a batch of one, where the model
        allows it.

    Some Python code turns the batch into a number, which non-strict export can't trace. Where it does so by `len(x)`,
    that is a size for as long as it is traced. Where it reads numbers from tensors that depend on no input, those are
    computed. Else strict export, which runs Dynamo, is the fallback. Raises non-strict export's first error where all
    fail.
    """
    called, signature = _named_arguments(model, signature)
    if signature.fixed:
        called = with_known_values(called, signature)
    # torch.export marks the tensors it is given as dynamic, and leaves the marks where it fails: the user's stay as is.
    args, kwargs = pytree.tree_map_only(Tensor, _alias, (signature.args, signature.kwargs))
    signature = replace(signature, args=args, kwargs=kwargs)
    sizes = {0: batch}
    dynamic = None if signature.fixed else _by_name(signature, lambda x: sizes if isinstance(x, Tensor) else None)
    export = functools.partial(torch.export.export, called, signature.args, signature.kwargs, dynamic_shapes=dynamic)

    def traced() -> tuple[torch.export.ExportedProgram, list[str]]:
        with watched(called) as attributes, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The tensor attribute")  # a cache, or refused below by name
            program = export()
        return program, attributes

    try:
        return traced()
    except OUT_OF_MEMORY:
        raise
    except Exception as error:
        if signature.fixed:
            raise
        if _fixed_batch(error):
            with contextlib.suppress(Exception), _lengths_as_sizes():
                return traced()
        if _reads_values(error):
            with contextlib.suppress(Exception), known_numbers_read():
                return traced()
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                program = export(strict=True)
        except Exception:
            log.debug("torch.export with strict=True fails as well", exc_info=True)
        else:
            # Dynamo's warnings name the objects whose attributes changed, not the attributes.
            return program, [str(warning.message) for warning in caught if "side effects" in str(warning.message)]
        raise


@contextlib.contextmanager
def _lengths_as_sizes() -> Iterator[None]:
    """Let `len` of a tensor be its first size, which may be symbolic. Python's own has to return a number.

    It is the process's, and the same for everything but a tensor that is traced; so is the tracing lock.
    """
    number = builtins.len

    def length(of: Any) -> Any:
        return of.shape[0] if isinstance(of, Tensor) and of.ndim else number(of)

    builtins.len = length
    try:
        yield
    finally:
        builtins.len = number


def _alias(tensor: Tensor) -> Tensor:
    """Return another tensor object over the same numbers, which requires gradients where the tensor does."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _must_be_runnable(program: torch.export.ExportedProgram) -> None:
    """Raise CaptureError where tracing has left something that no graph can run: calls of torch.func, fake tensors."""
    left = [str(node.target) for node in program.graph.nodes if is_functorch(node.target)]
    left += [name for name, value in program.constants.items() if is_fake(value)]
    if left:
        raise CaptureError(
            f"torch.export leaves {left[0]} in the graph, which can't run outside of tracing: torch.func (vmap, grad) "
            f"inside a forward has to be written as operators on the batch"
        )


def _named_arguments(model: nn.Module, signature: CallSignature) -> tuple[nn.Module, CallSignature]:
    """Return the model and signature with explicit parameters for the flags that its forward takes as `**kwargs`.

    torch 2.11 exports only named parameters.
    """
    parameters = signature.parameters.parameters
    extra = [name for name in signature.kwargs if name not in parameters]
    if not extra:
        return model, signature
    named = [p for p in parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    named += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in extra]
    spelled = signature.parameters.replace(parameters=named)
    return CalledAs(model, model.forward, spelled), replace(signature, parameters=spelled)


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


def _mutates(gm: fx.GraphModule) -> bool:
    """Return whether a graph, or one that it calls, changes a tensor in place."""
    schemas = (
        getattr(node.target, "_schema", None)
        for part in gm.modules()
        if isinstance(part, fx.GraphModule)
        for node in part.graph.nodes
    )
    return any(schema is not None and schema.is_mutable for schema in schemas)


def _by_name(signature: CallSignature, each: Callable[[Any], Any]) -> dict[str, Any]:
    """Apply `each` to every leaf and return the results by parameter name, as torch.export takes dynamic shapes."""
    args, kwargs = pytree.tree_map(each, (signature.args, signature.kwargs))
    return dict(signature.parameters.bind(*args, **kwargs).arguments)


def _where(error: Exception) -> str:
    """Return " [file:line: code]" of the innermost frame in the model's own source, or "" where there is none."""
    own = (str(Path(torch.__file__).parent), str(Path(__file__).parent), contextlib.__file__)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(own)]
    model = [frame for frame in frames if frame.name != "<module>"]
    return f" [{model[-1].filename}:{model[-1].lineno}: {model[-1].line}]" if model else ""


def _first_lines(error: Exception, count: int = 3) -> str:
    return "\n".join(str(error).strip().splitlines()[:count]) or type(error).__name__
