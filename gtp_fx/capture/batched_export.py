"""torch.export of a module for any batch size, also where its Python code makes a number of the batch."""

from __future__ import annotations

import builtins
import contextlib
import functools
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gtp_fx.capture.called_as import CalledAs
from gtp_fx.capture.export_errors import fixed_batch, reads_values
from gtp_fx.capture.known_numbers import known_numbers_read
from gtp_fx.capture.known_values import with_known_values
from gtp_fx.capture.side_effects import watched
from gtp_fx.capture.signatures import CallSignature
from gtp_fx.graph.torch_internals import OUT_OF_MEMORY

log = logging.getLogger(__name__)

_WITHOUT_GRADIENTS = ("Inference tensor", "does not support backward")
"""What torch says of a forward that can be traced without gradients alone."""


def batched_program(model: nn.Module, signature: CallSignature) -> tuple[torch.export.ExportedProgram, list[str]]:
    """Return what `export_batched` does; without gradients where the model only runs so.

    Such are models that hold inference tensors, and flex_attention on a CPU, which is opened and has gradients then.
    """
    try:
        return export_batched(model, signature)
    except RuntimeError as error:
        if not _is_of_gradients(error):
            raise
    with torch.no_grad():
        return export_batched(model, signature)


def _is_of_gradients(error: Exception) -> bool:
    """Return whether an error says that a forward can be traced without gradients alone."""
    return any(reason in str(error) for reason in _WITHOUT_GRADIENTS)


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
        if signature.fixed or _is_of_gradients(error):
            raise
        if fixed_batch(error):
            with contextlib.suppress(Exception), _lengths_as_sizes():
                return traced()
        if reads_values(error):
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


def _by_name(signature: CallSignature, each: Callable[[Any], Any]) -> dict[str, Any]:
    """Apply `each` to every leaf and return the results by parameter name, as torch.export takes dynamic shapes."""
    args, kwargs = pytree.tree_map(each, (signature.args, signature.kwargs))
    return dict(signature.parameters.bind(*args, **kwargs).arguments)
