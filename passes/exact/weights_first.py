"""Exact: a product of values and an attention's weights has the weights first, and they are a softmax along their rows.

    v [D, N] · softmax(q·kᵀ, -1)ᵀ     ->   (softmax(q·kᵀ, -1) · vᵀ)ᵀ
    v [D, N] · softmax(k·qᵀ, -2)      ->   the same

That is how attention is written where tokens come last, [B, C, N] or [B, C, H, W], and how some einsums come out. Later
passes know one order.
"""

from __future__ import annotations

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph import edit
from gtp_fx.graph.operators import MATRIX_PRODUCTS, PERMUTATIONS, RESIDUAL_SUMS, SCALINGS, SOFTMAXES
from gtp_fx.graph.rearrangements import order_of
from gtp_fx.graph.symbols import shape_of
from gtp_fx.passes.exact.read_softmax import NUMBER_PRESERVING

_READ_ALIKE = (*PERMUTATIONS, *NUMBER_PRESERVING)


def weights_first(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of `gm` in which weights come first and run over keys last; `gm` itself where they do."""
    if not any(_sums_columns(node) or _has_weights_second(node) for node in gm.graph.nodes):
        return gm
    gm = edit.copy_of(gm)
    for node in list(gm.graph.nodes):
        if _sums_columns(node):
            _along_rows(gm.graph, node)
    for node in list(gm.graph.nodes):
        if _has_weights_second(node):
            _exchange(gm.graph, node)
    return edit.finish(gm)


def _has_weights_second(node: fx.Node) -> bool:
    """Tell whether a node is a product of matrices of which the second is a transposed softmax, and the first none."""
    if node.target not in MATRIX_PRODUCTS or any(len(shape_of(x)) < 3 for x in node.args[:2]):  # type: ignore[arg-type]
        return False
    first, second = (_weights(operand) for operand in node.args[:2])  # type: ignore[arg-type]
    return second is not None and second[1] and first is None


def _weights(operand: fx.Node) -> tuple[fx.Node, bool] | None:
    """Return the softmax along rows that an operand is, and whether it is transposed; None where it is none.

    Some entries may be replaced: where(isnan(w), 0, w).
    """
    transposed = False
    while operand.target in (*_READ_ALIKE, aten.where.self):
        if operand.target in PERMUTATIONS:
            if not _swaps(operand):
                return None
            transposed = not transposed
        operand = operand.args[2 if operand.target is aten.where.self else 0]  # type: ignore[assignment]
    along_rows = operand.target in SOFTMAXES and operand.args[1] in (-1, len(shape_of(operand)) - 1)
    return (operand, transposed) if along_rows else None


def _sums_columns(node: fx.Node) -> bool:
    """Tell whether a node is a softmax of a product along its columns, [..., keys, queries], by which values are added.

    Columns that are shared out and not added up again, softmax(q·kᵀ, -2)·v, are no attention's weights.
    """
    if node.target not in SOFTMAXES or len(shape_of(node)) < 3 or node.args[1] not in (-2, len(shape_of(node)) - 2):
        return False
    logits: object = node.args[0]
    while isinstance(logits, fx.Node) and logits.target in (*SCALINGS, *RESIDUAL_SUMS, *_READ_ALIKE):
        logits = logits.args[0]
    return isinstance(logits, fx.Node) and logits.target in MATRIX_PRODUCTS and _adds_columns(node)


def _adds_columns(weights: fx.Node, transposed: bool = False) -> bool:
    """Tell whether a product adds up along the columns of `weights`, or along its rows where it is transposed."""
    for user in weights.users:
        if user.target in MATRIX_PRODUCTS and user.args[0 if transposed else 1] is weights:
            return True
        swapped = transposed != _swaps(user)
        if (_swaps(user) or user.target in NUMBER_PRESERVING) and _adds_columns(user, swapped):
            return True
        if user.target is aten.where.self and user.args[2] is weights and _adds_columns(user, transposed):
            return True
    return False


def _along_rows(graph: fx.Graph, softmax: fx.Node) -> None:
    """Turn softmax(l, -2) into softmax(lᵀ, -1)ᵀ."""
    emit = edit.Emitter(graph, like=softmax, before=softmax)
    weights = emit(softmax.target, _swapped(emit, softmax.args[0]), -1, *softmax.args[2:])  # type: ignore[arg-type]
    weights.kwargs = softmax.kwargs
    weights.meta["val"] = softmax.meta["val"].mT
    edit.replace(softmax, _swapped(emit, weights))


def _exchange(graph: fx.Graph, product: fx.Node) -> None:
    """Turn a·wᵀ into (w·aᵀ)ᵀ."""
    emit = edit.Emitter(graph, like=product, before=product)
    values, weights = (_swapped(emit, operand) for operand in product.args[:2])  # type: ignore[arg-type]
    exchanged = emit(product.target, weights, values)
    exchanged.meta["val"] = product.meta["val"].mT
    edit.replace(product, _swapped(emit, exchanged))


def _swapped(emit: edit.Emitter, x: fx.Node) -> fx.Node:
    """Return a value with its last two dimensions exchanged: its source or its operands', where they are at hand."""
    if _swaps(x):
        return x.args[0]  # type: ignore[return-value]
    value = x.meta["val"]
    if x.target in PERMUTATIONS:
        order = order_of(x)
        new = emit(aten.permute.default, x.args[0], [*order[:-2], order[-1], order[-2]])
    elif len(x.users) == 1 and x.target in NUMBER_PRESERVING:
        new = emit(x.target, _swapped(emit, x.args[0]), *x.args[1:])  # type: ignore[arg-type]
        new.kwargs = x.kwargs
    elif len(x.users) == 1 and x.target in (*SCALINGS, *RESIDUAL_SUMS) and all(map(_is_matrix, x.args[:2])):
        sides = [_swapped(emit, side) if isinstance(side, fx.Node) else side for side in x.args[:2]]
        new = emit(x.target, *sides)
        new.kwargs = x.kwargs
    elif len(x.users) == 1 and x.target in MATRIX_PRODUCTS and all(map(_is_matrix, x.args[:2])):
        first, second = (_swapped(emit, operand) for operand in x.args[:2])  # type: ignore[arg-type]
        new = emit(x.target, second, first)
    else:
        new = emit(aten.transpose.int, x, -2, -1)
    new.meta["val"] = value.mT
    return new


def _is_matrix(operand: object) -> bool:
    """Tell whether an operand is a number or has rows and columns to be exchanged."""
    return not isinstance(operand, fx.Node) or len(shape_of(operand)) >= 2


def _swaps(node: fx.Node) -> bool:
    """Tell whether a node exchanges its operand's last two dimensions, and nothing else."""
    if node.target not in PERMUTATIONS:
        return False
    order = order_of(node)
    return order == (*range(len(order) - 2), len(order) - 1, len(order) - 2)
