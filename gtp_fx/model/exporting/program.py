"""An optimised model as a torch.export program in plain ATen, which can be loaded without this package."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from gtp_fx.capture.batched_export import export_batched
from gtp_fx.capture.called_as import CalledAs
from gtp_fx.capture.signatures import CallSignature, device_of, tensors_in
from gtp_fx.errors import CaptureError, ExportError
from gtp_fx.graph.torch_internals import OUT_OF_MEMORY, tracing_lock
from gtp_fx.model.internal_errors import internal_errors_reported
from gtp_fx.model.optimized_model import OptimizedModel
from gtp_fx.ops.register import written_in_aten

_IMAGES = 3
"""Batch of the example: not one, which broadcasts, and not two, which the model was captured with."""


@dataclass(frozen=True, eq=False)
class Program:
    """A program with an example to check by.

    model: the optimised model.
    program: the exported program, for any batch.
    args, kwargs: an example of its inputs, noise.
    outputs: what the optimised model returns for the example, run eagerly.
    """

    model: OptimizedModel
    program: torch.export.ExportedProgram
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Any

    def tensors(self) -> list[Tensor]:
        """Return the example's tensors in the program's order."""
        return tensors_in((self.args, self.kwargs))

    def results(self) -> list[Tensor]:
        """Return the tensors in the example's outputs."""
        return tensors_in(self.outputs)

    def names(self) -> tuple[list[str], list[str]]:
        """Return readable names of inputs and outputs: forward's parameters, and the keys of a mapping ("logits")."""
        specs = self.program.graph_signature.input_specs
        inputs = [spec.arg.name for spec in specs if spec.kind is torch.export.graph_signature.InputKind.USER_INPUT]
        given = [
            name
            for name, leaf in zip(inputs, pytree.tree_leaves((self.args, self.kwargs)), strict=True)
            if isinstance(leaf, Tensor)
        ]
        return given, _output_names(self.outputs)


def exported_program(model: OptimizedModel) -> torch.export.ExportedProgram:
    """Export the evaluation graph, for any batch, with every `gtp_fx` operator decomposed into ATen.

    Inputs and parameters have the original's names. Raises ExportError where `model` isn't what `gtp_fx.optimize`
    returns or is on the meta device, and CaptureError where torch.export can't trace the graph.
    """
    return program_of(model).program


def program_of(model: OptimizedModel) -> Program:
    """Export as `exported_program` does, with an example of inputs and outputs to check files by."""
    if not isinstance(model, OptimizedModel):
        raise ExportError(f"export takes what gtp_fx.optimize returned, and got a {type(model).__name__}")
    device = device_of(model)
    if device.type == "meta":
        raise ExportError("this model is on the meta device, so it has no weights to export: load it with weights")
    with internal_errors_reported():
        return _program(model, device)


def _program(model: OptimizedModel, device: torch.device) -> Program:
    """Export the evaluation graph of a model on `device`, which has weights."""
    call = model.signature
    if call.fixed:
        raise ExportError(
            f"this model's graph is for {call.described} alone, which is compared at every call, and a file wouldn't: "
            f"serve the model itself, or save_pretrained and load it; torch.export.export(fast.graph_module, …) traces "
            f"the graph for whom these integers never differ"
        )
    generator = torch.Generator().manual_seed(0)

    def example(leaf: Tensor) -> Tensor:
        if not leaf.is_floating_point():
            return torch.cat([leaf, leaf[:1]])[:_IMAGES].to(device)
        return torch.randn(_IMAGES, *leaf.shape[1:], generator=generator).to(device, leaf.dtype)

    args, kwargs = pytree.tree_map_only(Tensor, example, (call.args, call.kwargs))
    spelled = CalledAs(model.graph_module, _written_out(model.graph_module), call.parameters)
    like_it = CallSignature(call.parameters, args, kwargs)
    with tracing_lock(), torch.no_grad():
        try:
            program, _ = export_batched(spelled, like_it, torch.export.Dim("batch"))
        # A named dimension reaches down to one image. A model that needs an even batch, or at least some size, has
        # none; the second try lets torch.export find the range.
        except OUT_OF_MEMORY:
            raise
        except Exception:
            try:
                program, _ = export_batched(spelled, CallSignature(call.parameters, call.args, call.kwargs))
            except OUT_OF_MEMORY:
                raise
            except Exception as error:
                raise CaptureError(f"torch.export can't trace the optimised graph: {error}") from error
        return Program(model, program, args, kwargs, model.graph_module(*args, **kwargs))


def required(package: str, what: str, packages: str) -> Any:
    """Import a package and return it. Raises ExportError where it can't be imported.

    what: what needs it.
    packages: what to install, in pip's words.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ExportError(
            f"{what} needs {package}, which can't be imported ({error}); pip install {packages}"
        ) from error


def _output_names(outputs: Any) -> list[str]:
    """Name the tensors of `outputs`: by key where it is a mapping, else by number."""
    if isinstance(outputs, Tensor):
        return ["output"]
    if not isinstance(outputs, Mapping):
        return [f"output_{number}" for number, _ in enumerate(tensors_in(outputs))]
    names = []
    for key, value in outputs.items():
        found = tensors_in(value)
        names += [key] if len(found) == 1 else [f"{key}_{number}" for number, _ in enumerate(found)]
    return names


def _written_out(gm: fx.GraphModule) -> Callable[..., Any]:
    """Return the graph's forward with every operator of this package decomposed into ATen."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _WrittenOut():
            return gm.forward(*args, **kwargs)

    return forward


class _WrittenOut(TorchFunctionMode):
    """Mode that runs this package's composite operators as plain functions, which tracing sees through.

    It also reaches operators that are called inside others.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        function = written_in_aten(getattr(func, "default", func))
        if function is None:
            return func(*args, **(kwargs or {}))
        with self:  # the function may call further ones
            return function(*args, **(kwargs or {}))
