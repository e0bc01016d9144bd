"""Exact: an einsum of two tensors that is a matrix product becomes one.

    einsum("bhid,bhjd->bhij", q, k)   ->   matmul(q, kᵀ)

so that later passes recognise attention in either spelling. Keys that all heads share get a dimension for heads. Other
einsums (more free labels, three operands) are kept.
"""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph import edit, nodes
from gtp_fx.graph.symbols import shape_of
from gtp_fx.types.rules.einsum import Equation


def einsum_to_matmul(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of `gm` in which einsums that are matrix products are `aten.matmul`; `gm` itself if it has none."""
    if not nodes.count_nodes(gm.graph, (aten.einsum.default,)):
        return gm
    gm = edit.copy_of(gm)
    for node in list(gm.graph.nodes):
        if node.target is aten.einsum.default:
            _as_matmul(gm.graph, node)
    return edit.finish(gm)


def _as_matmul(graph: fx.Graph, node: fx.Node) -> None:
    """Replace an einsum by a matrix product with permutes around it, where it is one."""
    arguments: tuple[Any, ...] = node.args
    equation = Equation.parse(arguments[0], [len(shape_of(operand)) for operand in arguments[1]])
    if equation is None or len(equation.terms) != 2:
        return
    # A matrix product has batch labels, and one each of row, column and summed labels.
    (a, b), operands, result = equation.terms, arguments[1], equation.result
    batch = [label for label in result if label in a and label in b]
    rows = [label for label in a if label not in b]
    columns = [label for label in b if label not in a]
    summed = [label for label in a if label in b and label not in result]
    if not (rows and len(columns) == len(summed) == 1) or {*rows, *columns} - set(result):
        return
    # Rows of several labels: a linear layer over several dimensions, or as many products with one matrix, as where all
    # heads share their keys. No other is as good as a product of matrices.
    together = "".join(batch)
    shared = bool(batch) and a.startswith(together) and b.startswith(together)
    if len(rows) > 1 and not shared and (batch or list(a) != [*rows, *summed]):
        return
    sizes = [dict(zip(term, shape_of(operand), strict=True)) for term, operand in zip((a, b), operands, strict=True)]
    if any(sizes[0][label] != sizes[1][label] for label in (*batch, *summed)):
        return  # an operand is broadcast along this label
    if sizes[0][summed[0]] == 1:
        return  # nothing is added up, so torch multiplies entry by entry, which counts no FLOPs
    with graph.inserting_before(node):
        left = _permuted(graph, operands[0], a, [*batch, *rows, *summed], node)
        right = _permuted(graph, operands[1], b, [*batch, *summed, *columns], node)
        for _ in rows[1:] if batch else ():
            right = edit.call(graph, aten.unsqueeze.default, right, len(batch), like=node)
        product = edit.call(graph, aten.matmul.default, left, right, like=node)
        output = _permuted(graph, product, "".join([*batch, *rows, *columns]), list(result), node)
    edit.replace(node, output)


def _permuted(graph: fx.Graph, x: fx.Node, labels: str, wanted: list[str], like: fx.Node) -> fx.Node:
    """Permute `x` from dimensions `labels` to the order `wanted`; by a transpose where that swaps the last two."""
    order = [labels.index(label) for label in wanted]
    if order == list(range(len(order))):
        return x
    rank = len(order)
    if order == [*range(rank - 2), rank - 1, rank - 2]:
        return edit.call(graph, aten.transpose.int, x, -2, -1, like=like)
    return edit.call(graph, aten.permute.default, x, order, like=like)
