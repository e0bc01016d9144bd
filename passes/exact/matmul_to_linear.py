"""Exact: a product with a parameter becomes a linear layer over all dimensions, with the bias that is added to it.

    x @ Wᵀ + b                                ->   linear(x, W, b)
    linear(x.view(N·B, C), W).view(N, B, C')  ->   linear(x, W)

So projections have one spelling, whatever they were written as: matmul, addmm over flattened tokens, tensordot, einsum.
"""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph import edit
from gtp_fx.graph.nodes import is_input
from gtp_fx.graph.operators import MATRIX_PRODUCTS, PERMUTATIONS, VIEWS
from gtp_fx.graph.symbols import shape_of, written

_OF_PARAMETERS = (*VIEWS, *PERMUTATIONS, aten.t.default, aten.numpy_T.default, aten.slice.Tensor, aten.select.int)
"""Operators that take a parameter, or a part of it, in another form."""


def matmul_to_linear(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of `gm` in which products with parameters are `aten.linear`; `gm` itself where there are none."""
    if not any(_is_product(node) or _is_bias_added(node) or _view_after(node) for node in gm.graph.nodes):
        return gm
    gm = edit.copy_of(gm)
    for node in list(gm.graph.nodes):
        if _is_product(node):
            _as_linear(gm.graph, node)
    # A bias may be added before or after the view that gives tokens a dimension of their own again.
    for _ in range(2):
        for node in list(gm.graph.nodes):
            if _is_bias_added(node):
                _with_bias(node)
        for node in list(gm.graph.nodes):
            if view := _view_after(node):
                _keep_rows_apart(gm.graph, node, view)
    return edit.finish(gm)


def _is_product(node: fx.Node) -> bool:
    """Tell whether a node is a product of something with a parameter [in, out]."""
    if node.target not in MATRIX_PRODUCTS:
        return False
    x, weight = node.args
    return _is_parameter(weight, rank=2) and isinstance(x, fx.Node) and len(shape_of(x)) >= 2


def _is_parameter(value: Any, rank: int) -> bool:
    """Tell whether a value of this rank is an input of the graph, or a part of one that isn't larger.

    Images have more dimensions than a parameter of a linear layer, so a part of them doesn't pass for one.
    """
    if not isinstance(value, fx.Node) or len(shape_of(value)) != rank:
        return False
    while value.target in _OF_PARAMETERS:
        value = value.all_input_nodes[0]
    return is_input(value) and len(shape_of(value)) <= 4


def _as_linear(graph: fx.Graph, product: fx.Node) -> None:
    """Replace a product by a linear layer; a transposition of the weight is undone."""
    x, weight = product.args
    assert isinstance(weight, fx.Node)
    emit = edit.Emitter(graph, like=product, before=product)
    if weight.target in (*PERMUTATIONS, aten.t.default, aten.numpy_T.default):
        rows: Any = weight.args[0]
    else:
        rows = emit(aten.transpose.int, weight, 0, 1)
        rows.meta["val"] = weight.meta["val"].transpose(0, 1)
    linear = emit(aten.linear.default, x, rows)
    edit.replace(product, linear)


def _is_bias_added(node: fx.Node) -> bool:
    """Tell whether a node adds a vector of parameters to a linear layer without a bias that nothing else reads."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return False
    linear, bias = _layer_first(node)
    return (
        isinstance(linear, fx.Node)
        and linear.target is aten.linear.default
        and len(linear.args) == 2
        and len(linear.users) == 1
        and _is_parameter(bias, rank=1)
        and shape_of(bias) == shape_of(linear)[-1:]  # type: ignore[arg-type]
        and linear.meta["val"].dtype == bias.meta["val"].dtype  # type: ignore[union-attr]
    )


def _with_bias(total: fx.Node) -> None:
    """Turn the addition of a bias into the linear layer with it."""
    linear, bias = _layer_first(total)
    total.target, total.args = aten.linear.default, (*linear.args, bias)


def _layer_first(total: fx.Node) -> tuple[Any, Any]:
    """Return the two operands of an addition, a linear layer before what is added to it."""
    first, second = total.args
    return (second, first) if isinstance(second, fx.Node) and second.target is aten.linear.default else (first, second)


def _view_after(linear: fx.Node) -> fx.Node | None:
    """Return the view that takes apart the rows of a linear layer, where a view has made them; else None."""
    if linear.target is not aten.linear.default or len(linear.users) != 1:
        return None
    merged: Any = linear.args[0]
    (view,) = linear.users
    if merged.target not in VIEWS or view.target not in VIEWS or shape_of(view)[-1] != shape_of(linear)[-1]:
        return None
    return view if len(shape_of(view)) > len(shape_of(linear)) and written(shape_of(view)).count(-1) <= 1 else None


def _keep_rows_apart(graph: fx.Graph, linear: fx.Node, view: fx.Node) -> None:
    """Let a linear layer work on the dimensions that its rows are made into after it."""
    merged: Any = linear.args[0]
    shape = (*shape_of(view)[:-1], shape_of(merged)[-1])
    emit = edit.Emitter(graph, like=linear, before=linear)
    rows = merged.args[0]
    if shape_of(rows) != shape:
        rows = emit(aten.reshape.default, rows, written(shape))
        rows.meta["val"] = merged.args[0].meta["val"].reshape(shape)
    new = emit(aten.linear.default, rows, *linear.args[1:])
    new.meta["val"] = view.meta["val"]
    view.replace_all_uses_with(new)
