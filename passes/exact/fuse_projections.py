"""Exact: linear layers that read the same tokens become one product.

    q, k, v = x·Wqᵀ, x·Wkᵀ, x·Wvᵀ   ->   split(x·[Wq; Wk; Wv]ᵀ)

Separate query, key and value projections are such layers, and so are those of gated MLPs. A GPU is fuller with one
product than with three, each of which has to start and to read the tokens anew. A core of a CPU multiplies as fast
either way and starts in no time, so there they stay. The weights are concatenated at every call, so that they remain
the model's own parameters (`load_state_dict`, training). That costs a copy of them, which pays for many tokens but not
for few.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.capture.layers import stays_whole
from gtp_fx.graph import edit, nodes
from gtp_fx.graph.symbols import per_image, shape_of
from gtp_fx.targets.target import Target

_FEWEST = 32
"""Fewest tokens per image for which layers are fused.

After `drop_dead_tokens` some layers compute a single token; their product is no larger than the copy of the weights.
"""


def fuse_projections(gm: fx.GraphModule, target: Target | None = None) -> fx.GraphModule:
    """Return a copy of `gm` in which linear layers that share an input are one; `gm` itself where none do.

    target: the processor that it is for; on a CPU nothing is fused. None where that isn't asked.
    """
    if (target is not None and target.device == "cpu") or not _groups(gm):
        return gm
    gm = edit.copy_of(gm)
    for linears in _groups(gm):
        _fuse(gm.graph, linears)
    return edit.finish(gm)


def _groups(gm: fx.GraphModule) -> list[list[fx.Node]]:
    """Return groups of two or more linear layers that read the same value."""
    by_input: dict[Any, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.target is aten.linear.default and _fusable(node) and not stays_whole(gm, node):
            by_input.setdefault(node.args[0], []).append(node)
    return [linears for linears in by_input.values() if len(linears) > 1]


def _fusable(linear: fx.Node) -> bool:
    """Tell whether a layer has enough tokens, and parameters that are inputs of the graph."""
    x, *parameters = linear.all_input_nodes
    rows = 1
    for size in shape_of(x)[:-1]:
        rows *= per_image(size)
    return rows >= _FEWEST and all(nodes.is_input(node) for node in parameters) and len(shape_of(linear)) > 1


def _fuse(graph: fx.Graph, linears: Sequence[fx.Node]) -> None:
    """Replace linear layers by one product whose result is split among their readers."""
    first = linears[0]
    widths = [shape_of(linear)[-1] for linear in linears]
    weights: list[Any] = [linear.args[1] for linear in linears]
    biases: list[Any] = [linear.args[2] if len(linear.args) > 2 else None for linear in linears]
    with graph.inserting_before(first):
        call = edit.Emitter(graph, like=first)

        weight = call(aten.cat.default, weights)
        # Layers without a bias get zeros where others have one.
        bias = None
        if any(bias is not None for bias in biases):
            filled = [
                call(aten.new_zeros.default, of, [width]) if bias is None else bias
                for bias, of, width in zip(biases, weights, widths, strict=True)
            ]
            bias = call(aten.cat.default, filled)
        product = call(aten.linear.default, first.args[0], weight, bias)
        parts = call(aten.split_with_sizes.default, product, widths, -1)
        outputs = [call(operator.getitem, parts, i) for i in range(len(linears))]
    for linear, output in zip(linears, outputs, strict=True):
        output.meta = {**linear.meta}
        edit.replace(linear, output)
