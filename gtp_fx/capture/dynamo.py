"""Conversion of Dynamo's graph, as a backend receives it, to the same ATen graph that `capture_module` returns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.nn import functional

from gtp_fx.capture.autocast_casts import clashes
from gtp_fx.capture.called_graphs import inlined
from gtp_fx.capture.export_errors import first_lines
from gtp_fx.capture.flex_attention import open_flex_attention
from gtp_fx.capture.fused_layers import open_layers
from gtp_fx.capture.mutations import changed_by, refuse_changes
from gtp_fx.capture.regions import AUTOCAST, has_regions, opened
from gtp_fx.capture.vocabulary import open_composites
from gtp_fx.errors import CaptureError, GtpError, PieceError
from gtp_fx.graph import edit
from gtp_fx.graph.nodes import operator_name, source_line
from gtp_fx.graph.operators import GRID_MAKERS
from gtp_fx.graph.primes import contradiction, fix_symbols
from gtp_fx.graph.torch_internals import (
    ENTER_AUTOCAST,
    ENTER_INFERENCE,
    EXIT_AUTOCAST,
    EXIT_INFERENCE,
    OUT_OF_MEMORY,
    SET_GRAD,
    aot_export,
    copy_parameter_sources,
    restarts_dynamo,
)


def capture_dynamo(gm: fx.GraphModule) -> fx.GraphModule:
    """Return the ATen graph of Dynamo's `gm`. Placeholders keep their order and their metadata.

    Raises CaptureError where the model changes its state when it runs, or holds what torch can't trace, and PieceError
    where the graph doesn't say how its open sizes belong together.
    """
    gm = _without_regions(gm)
    old = [node for node in gm.graph.nodes if node.op == "placeholder"]
    fakes = [node.meta["example_value"] for node in old]
    exported, signature = _traced(gm, fakes)
    if _specialise_grids(exported.graph, fakes):
        # The image's sides are constants now, so a second export has no symbols for them.
        exported, signature = _traced(gm, fakes)
    refuse_changes("the model", changed_by(signature))
    graph_module: Any = exported
    _hold_again(graph_module, gm, {**signature.inputs_to_parameters, **signature.inputs_to_buffers})
    new = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    for before, after in zip(old, new, strict=True):
        # Inductor reads from the metadata which inputs are parameters. Without it, every replay of a CUDA graph copies
        # every weight.
        after.meta = {**before.meta, **after.meta}
    graph_module.meta.update(gm.meta)
    copy_parameter_sources(graph_module, gm)
    graph_module = opened(graph_module)
    if clash := clashes(graph_module.meta.get(AUTOCAST, ())):
        raise CaptureError(clash)
    copy_parameter_sources(graph_module, gm)
    open_composites(graph_module)
    fix_symbols(graph_module)
    if view := contradiction(graph_module.graph):
        raise PieceError(
            f"{operator_name(view)} [{source_line(view)}] is known to fit by how two open sizes belong together, which "
            f"the graph doesn't say: give a batch of one size, without mark_dynamic, or optimise the whole model"
        )
    return cast("fx.GraphModule", graph_module)


def _traced(gm: fx.GraphModule, fakes: Sequence[Any]) -> tuple[fx.GraphModule, Any]:
    """Return what `aot_export` does. Raises CaptureError where torch's tracer fails on what Dynamo let through."""
    try:
        return aot_export(gm, fakes)
    except (GtpError, *OUT_OF_MEMORY):
        raise
    except Exception as error:
        if restarts_dynamo(error):
            raise
        raise CaptureError(
            f"torch can't trace this graph of Dynamo's as ATen: {_told(error)}\nWrite what it stopped at as "
            f"operators on the batch (torch.func's vmap and grad can't be traced there), or optimise an inner module "
            f"without it"
        ) from error


def _told(error: Exception) -> str:
    """Return the first line of torch's error, the node at which it stopped, and the line of the model's source."""
    text, torch_itself = str(error), str(Path(torch.__file__).parent)
    node = re.search(r"^While executing (%\w+)", text, re.MULTILINE)
    lines = re.findall(r'File "([^"]+)", line (\d+)', text)
    own = [f"{file}:{line}" for file, line in lines if not file.startswith(torch_itself)]
    return first_lines(error, 1) + (f", at {node[1]}" if node else "") + (f" [{own[-1]}]" if own else "")


def _without_regions(gm: fx.GraphModule) -> fx.GraphModule:
    """Return Dynamo's graph with what AOT can't trace opened; `gm` itself where it holds nothing of the kind.

    These are graphs that operators call (recomputed or compiled regions, flex_attention's), fused layers, inference
    mode, which becomes a region without gradients, autocast, which AOT would record and not switch on, and dropouts
    that are off.
    """
    new = inlined(gm) if has_regions(gm) else edit.copy_of(gm)
    changed = open_layers(new.graph) or has_regions(gm)
    changed = open_flex_attention(new, "example_value") or changed
    changed = _without_idle_dropouts(new.graph) or changed
    for node in new.graph.nodes:
        if node.target is ENTER_INFERENCE:
            node.target, node.args = SET_GRAD, (not node.args[0],)
        elif node.target is EXIT_INFERENCE:
            node.target, node.args = SET_GRAD, (True,)
        elif node.target in _AUTOCAST:
            node.target = _AUTOCAST[node.target]
        else:
            continue
        changed = True
    if not changed:
        return gm
    new.recompile()
    copy_parameter_sources(new, gm)
    return new


def _without_idle_dropouts(graph: fx.Graph) -> bool:
    """Remove dropouts that are off, and return whether there were any.

    They return what they are given, which a model may write to. AOT refuses that, as it would be wrong of one that is
    on.
    """
    found = [node for node in graph.nodes if node.target in _DROPOUTS and not _is_on(node)]
    for node in found:
        edit.replace(node, node.all_input_nodes[0])
    return bool(found)


def _is_on(node: fx.Node) -> bool:
    """Return whether a call of dropout(input, p=0.5, training=True, inplace=False) drops anything."""
    return bool(node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True))


_DROPOUTS = (functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d)


def _enter_autocast(device: str, dtype: torch.dtype | None, enabled: bool, cached: bool) -> torch.autocast:
    """Begin an autocast that is on while AOT traces."""
    context = torch.autocast(device, dtype, enabled, cached)
    context.__enter__()
    return context


def _exit_autocast(context: torch.autocast) -> None:
    """End it."""
    context.__exit__(None, None, None)


_AUTOCAST = {ENTER_AUTOCAST: _enter_autocast, EXIT_AUTOCAST: _exit_autocast}


def _specialise_grids(graph: fx.Graph, fakes: Sequence[Any]) -> bool:
    """Specialise the image's height and width, where Dynamo made them symbolic, and return whether there were any.

    Dynamo makes a size symbolic when it meets a second value, but a schedule is for one grid. Each image size thus gets
    a graph of its own, as with dynamic=False. The batch size stays symbolic.
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
        int(size)  # the conversion installs the guard
        for fake in fakes
        if isinstance(fake, Tensor)
        for size in fake.shape
        if isinstance(size, torch.SymInt) and size.node.expr.free_symbols & sides
    ]
    return bool(fixed)


def _is_image(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim >= 4 and value.is_floating_point()


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
