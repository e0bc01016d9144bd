"""The torch.compile backend, for graphs that Dynamo captures: `torch.compile(model, backend="gtp", options={…})`.

The options are `optimize`'s (flops_budget, schedule, strategy, target, …), and mode, because torch refuses mode=
together with options=. Dynamo calls a backend once per graph, and again for a second batch size. The schedule depends
on the graph alone, so it is the same each time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.capture.dynamo import capture_dynamo
from gtp_fx.errors import (
    BudgetError,
    InternalError,
    NoBlocksError,
    OptionError,
    PieceError,
    ScheduleError,
    UnsupportedModelError,
    warn,
)
from gtp_fx.graph.torch_internals import code_when_called, compile_with_inductor
from gtp_fx.model.internal_errors import internal_errors_reported
from gtp_fx.model.pipeline import run_exact_passes, run_passes
from gtp_fx.model.sections.backend import InSections
from gtp_fx.options.options import Options
from gtp_fx.passes.exact.mark_tokens import mark_tokens
from gtp_fx.passes.lower.triton_kernels import lowered
from gtp_fx.passes.order import must_be_optional


def gtp(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """Rewrite Dynamo's graph and compile it with Inductor.

    Where user code breaks the graph, each piece is planned for itself and meets the budget on its own count. A piece
    without attention over tokens is compiled unchanged, with a warning; so is one whose tokens come in as an argument
    and can't be reduced as required, and one on which gtp_fx itself fails (InternalError). With the option strict all
    of these are raised. Raises OptionError for a bad option and for a model that is already optimised, and otherwise
    what `optimize` raises.
    """
    checked = Options.of_backend({"mode": mode, **(options or {})})
    must_be_optional(checked.disabled_passes)
    if any(getattr(node.target, "namespace", "") == "gtp_fx" for node in gm.graph.nodes):
        raise OptionError("backend 'gtp': this model is optimised already; compile it with torch.compile's own backend")
    device = _device(example_inputs)
    patches = checked.inductor(device)
    try:
        with internal_errors_reported():
            graph = _rewritten(gm, device, checked)
    except (NoBlocksError, PieceError, InternalError) as error:
        if checked.strict:
            raise
        warn(f"backend 'gtp': Inductor compiles this graph as it is: {error}")
        graph = gm
    if checked.shapes == "static":
        return compile_with_inductor(graph, example_inputs, patches)
    return InSections(patches, checked.shapes)(graph, example_inputs)


@code_when_called()
def _rewritten(gm: fx.GraphModule, device: torch.device, options: Options) -> fx.GraphModule:
    """Return the graph to compile. Raises PieceError where a piece between graph breaks can't be reduced."""
    captured = capture_dynamo(gm)
    try:
        optimised = run_passes(captured, options)
    except (BudgetError, ScheduleError, UnsupportedModelError) as error:
        if isinstance(error, NoBlocksError) or not _is_piece(captured, options):
            raise
        raise PieceError(str(error)) from error
    return lowered(optimised.graph_module, device, options.disabled_passes, options.target.scale_form)


def _is_piece(captured: fx.GraphModule, options: Options) -> bool:
    """Return whether no patches are made in a graph, so that its blocks can only be those of token arguments."""
    disabled = (*options.disabled_passes, mark_tokens.__name__)
    exact = run_exact_passes(captured, replace(options, disabled_passes=disabled, dump_graphs=None))
    return not typed_graph(exact.graph_module.graph).blocks


def _device(inputs: Sequence[Any]) -> torch.device:
    """Return the device a graph runs on: the GPU of any of its inputs, else the CPU; scalars may be on the host."""
    devices = [value.device for value in inputs if isinstance(value, torch.Tensor)]
    return next((device for device in devices if device.type == "cuda"), torch.device("cpu"))
