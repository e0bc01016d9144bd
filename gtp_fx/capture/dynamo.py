"""Dynamo's graph, as a backend gets it, to the same ATen graph that the module door captures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from gtp_fx.capture.module import _changed, _hold_again, _refuse_changes
from gtp_fx.graph.operators import GRID_MAKERS
from gtp_fx.graph.symbols import fix_symbols
from gtp_fx.graph.torch_internals import aot_export, copy_parameter_sources


def capture_dynamo(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph of what Dynamo hands a backend: placeholders (and what is known of them) stay as they are, in order."""
    old = [node for node in gm.graph.nodes if node.op == "placeholder"]
    fakes = [node.meta["example_value"] for node in old]
    exported, signature = aot_export(gm, fakes)
    if _specialise_grids(exported.graph, fakes):
        exported, signature = aot_export(gm, fakes)
    _refuse_changes("the model", _changed(signature))
    graph_module: Any = exported
    _hold_again(graph_module, gm, {**signature.inputs_to_parameters, **signature.inputs_to_buffers})
    new = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    for before, after in zip(old, new, strict=True):
        # Inductor reads from it which inputs are parameters: without it every weight is copied at a CUDA graph's replay.
        after.meta = {**before.meta, **after.meta}
    graph_module.meta.update(gm.meta)
    copy_parameter_sources(graph_module, gm)
    fix_symbols(graph_module)
    return cast("fx.GraphModule", graph_module)


def _specialise_grids(graph: fx.Graph, fakes: Sequence[Any]) -> bool:
    """Guard on the image's sides where Dynamo has made them symbolic (it does at the second size): schedules are for one grid.

    Each size is then a graph of its own, as it is for Dynamo with dynamic=False; the batch stays open.
    """
    sides = {
        symbol
        for node in graph.nodes
        if node.target in GRID_MAKERS or (node.op == "placeholder" and _is_image(node.meta.get("val")))
        for size in node.meta["val"].shape[2:]
        if isinstance(size, torch.SymInt)
        for symbol in size.node.expr.free_symbols
    }
    fixed = [
        int(size)  # asking for the number is what makes the guard
        for fake in fakes
        if isinstance(fake, Tensor)
        for size in fake.shape
        if isinstance(size, torch.SymInt) and size.node.expr.free_symbols & sides
    ]
    return bool(fixed)


def _is_image(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim >= 4 and value.is_floating_point()
