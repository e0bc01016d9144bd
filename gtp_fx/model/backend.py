"""The torch.compile backend, for graphs that Dynamo captures: `torch.compile(model, backend="gtp", options={…})`.

The options are `optimize`'s (flops_budget, schedule, strategy, target, …), and mode, because torch refuses mode=
together with options=. Dynamo calls a backend once per graph, and again for a second batch size. The schedule depends
on the graph alone, so it is the same each time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from gtp_fx.capture.dynamo import capture_dynamo
from gtp_fx.errors import InternalError, NoBlocksError, OptionError
from gtp_fx.graph.torch_internals import compile_with_inductor
from gtp_fx.model.internal_errors import internal_errors_told
from gtp_fx.model.pipeline import run_passes
from gtp_fx.options.options import Options
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

    A graph without attention over patches is compiled unchanged, with a warning: graph breaks cut such pieces off
    before and after a model. So is one on which gtp_fx itself fails (InternalError). With the option strict both are
    raised. Raises OptionError for a bad option and for a model that is already optimised, and otherwise what `optimize`
    raises.
    """
    checked = Options.of_backend({"mode": mode, **(options or {})})
    must_be_optional(checked.disabled_passes)
    if any(getattr(node.target, "namespace", "") == "gtp_fx" for node in gm.graph.nodes):
        raise OptionError("backend 'gtp': this model is optimised already; compile it with torch.compile's own backend")
    device = _device(example_inputs)
    patches = checked.inductor(device)
    try:
        with internal_errors_told():
            optimised = run_passes(capture_dynamo(gm), checked)
            graph = lowered(optimised.graph_module, device, checked.disabled_passes, checked.target.told)
    except (NoBlocksError, InternalError) as error:
        if checked.strict:
            raise
        warnings.warn(f"backend 'gtp': Inductor compiles this graph as it is: {error}", stacklevel=2)
        graph = gm
    return compile_with_inductor(graph, example_inputs, patches)


def _device(inputs: Sequence[Any]) -> torch.device:
    """Return the device a graph runs on: the GPU of any of its inputs, else the CPU; scalars may be on the host."""
    devices = [value.device for value in inputs if isinstance(value, torch.Tensor)]
    return next((device for device in devices if device.type == "cuda"), torch.device("cpu"))
