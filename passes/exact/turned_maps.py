"""How operators on maps [B, C, *sides] work where these are turned to [B, *sides, C]: as operators on features."""

from __future__ import annotations

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph import edit
from gtp_fx.passes.exact.turned_layout import Order, Walk, arguments
from gtp_fx.types.rules.spatial import is_pointwise


def pointwise_convolution(walk: Walk, node: fx.Node, order: Order) -> Order | None:
    """Convolutions with a kernel of one over a map whose channels are last, which are linear layers."""
    x, weight, *bias = arguments(node)
    if x not in walk.turned or not _has_channels_last(order) or not is_pointwise(node) or walk.stays_whole(node):
        return None
    emit = edit.Emitter(walk.graph, like=node, before=node)
    matrix = emit(aten.squeeze.dims, weight, list(range(2, len(order))))
    node.target, node.kwargs = aten.linear.default, {}
    node.args = (walk.turned[x][0], matrix, bias[0] if bias else None)
    return order


def fixed_norm(walk: Walk, node: fx.Node, order: Order) -> Order | None:
    """Batch norms with running statistics, over a map whose channels are last: a scale and a shift."""
    x, weight, bias, mean, variance, *rest = arguments(node)
    if node.target is aten.batch_norm.default:
        training, _, eps, *_ = rest
        if training or mean is None:
            return None
    else:  # which also returns statistics that it saves
        _, eps = rest
        if any(item.args[1] != 0 for item in node.users):
            return None
    if x not in walk.turned or not _has_channels_last(order) or walk.stays_whole(node):
        return None
    emit = edit.Emitter(walk.graph, like=node, before=node)
    scale = emit(aten.rsqrt.default, emit(aten.add.Scalar, variance, eps))
    scale = scale if weight is None else emit(aten.mul.Tensor, scale, weight)
    normed = emit(aten.mul.Tensor, emit(aten.sub.Tensor, walk.turned[x][0], mean), scale)
    node.target, node.kwargs = aten.add.Tensor, {}
    node.args = (normed, 0 if bias is None else bias)
    return order


def _has_channels_last(order: Order) -> bool:
    """Return whether what `order` turns back to [B, C, *sides] lies as [B, *sides, C]."""
    return order == (0, len(order) - 1, *range(1, len(order) - 1))
