"""What an exported graph changes in place: buffers and inputs that its next call, or its caller, would read.

A rewritten graph computes tensors and changes nothing, so such a model is refused. Attributes that aren't tensors of
the graph are `gtp_fx.capture.side_effects`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from gtp_fx.errors import CaptureError
from gtp_fx.graph.nodes import ancestors


def unread_buffers(program: torch.export.ExportedProgram) -> list[str]:
    """Return the buffers that a program updates and that none of its results depends on."""
    signature, (output,) = program.graph_signature, program.graph.find_nodes(op="output")
    updates = signature.buffers_to_mutate
    results = [node for node in output.all_input_nodes if node.name not in updates]
    read = {node.name for result in results for node in (result, *ancestors(result))}
    held = {buffer: name for name, buffer in signature.inputs_to_buffers.items()}
    return [buffer for buffer in updates.values() if held[buffer] not in read]


def changed_by(signature: Any) -> list[str]:
    """Return the names of the buffers and inputs that an exported graph mutates."""
    return [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]


def refuse_changes(model: str, changed: Sequence[str]) -> None:
    """Raise CaptureError where `changed` is not empty."""
    if changed:
        raise CaptureError(
            f"{model} changes {', '.join(changed)} when it runs, for its next call or its caller to read, which a "
            f"rewritten graph can't do: remove the change from forward, or optimise the module inside that changes "
            f"nothing (in model.eval() most don't)"
        )


def mutates(gm: fx.GraphModule) -> bool:
    """Return whether a graph, or one that it calls, changes a tensor in place."""
    schemas = (
        getattr(node.target, "_schema", None)
        for part in gm.modules()
        if isinstance(part, fx.GraphModule)
        for node in part.graph.nodes
    )
    return any(schema is not None and schema.is_mutable for schema in schemas)
