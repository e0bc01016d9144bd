"""Lowering of sites: one kernel for selection, one for propagation with the residual add before and the norm after."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.ops import aten, gtp_fx  # type: ignore[import-not-found]

from gtp_fx.graph.symbols import shape_of
from gtp_fx.passes.lower.lowering import Lowering, fits_kernels, only, summands


def lower_select(low: Lowering, node: fx.Node) -> None:
    """Lower `select`, with the two gathers that give its tokens' places on the whole grid after an earlier site.

    The call stays where the grid has more cells than the kernel takes.
    """
    score, count = node.args
    kept, removed = (only(user for user in node.users if user.args[1] == index) for index in (0, 1))
    if kept is None or removed is None:
        return
    # After an earlier site both results index that site's tokens, whose places are in the earlier map.
    cells, before = shape_of(score)[1], None  # type: ignore[arg-type]
    gathers = [only(user for user in part.users if _is_index(user, part)) for part in (kept, removed)]
    known = {gather.args[0] for gather in gathers if gather is not None} & low.maps.keys()
    if None not in gathers and len(known) == 1:
        before, cells = low.maps[known.pop()]  # type: ignore[index]
    if cells > low.kernels.most_cells:
        return
    made = low.call(node, low.kernels.select, score, before, count, cells)
    on_grid = kept = low.swap(kept, low.item(made, 0))
    low.swap(removed, low.item(made, 1))
    if before is not None:
        on_grid, _ = (low.swap(gather, low.item(made, place)) for gather, place in zip(gathers, (2, 3), strict=True))  # type: ignore[arg-type]
    low.maps[on_grid] = low.item(made, 4), cells


def _is_index(node: fx.Node, part: fx.Node) -> bool:
    """Tell whether `node` gathers the grid places of the tokens `part` from those of all tokens."""
    return node.target is aten.gather.default and node.args[1:3] == (1, part)


def lower_propagate(low: Lowering, node: fx.Node) -> None:
    """Lower a stream's `propagate`, with the residual add before it, the scales' `propagate`, and the norm after it.

    The call stays where its weights aren't those of a token graph, or where the kernel doesn't take its sizes.
    """
    x, weights, kept, removed, alpha, prefix, *own = node.args
    of_a_graph = weights.target is gtp_fx.propagation_weights.default  # type: ignore[union-attr]
    if own or not of_a_graph or _is_column(node):
        return
    near, degree, on_grid, removed_on_grid, grid, kind, *places = weights.args  # type: ignore[union-attr]
    if places:
        return  # of tokens in another order than the grid's
    channels = shape_of(x)[-1]  # type: ignore[arg-type]
    if on_grid not in low.maps or channels > low.kernels.most_channels or not fits_kernels(grid):  # type: ignore[arg-type]
        return
    place, _ = low.maps[on_grid]  # type: ignore[index]
    # What runs in the same kernel: the norm that reads the result, and the scales, propagated by the same weights.
    # Scales of the first site are ones, which the kernel doesn't need to read.
    norm = next((user for user in node.users if _is_norm(user, node, channels)), None)
    scale, bias, eps = _norm_of(norm)
    column = only(user for user in weights.users if _is_column(user) and user.args[2:5] == (kept, removed, alpha))  # type: ignore[union-attr]
    scales = None if column is None else column.args[0].args[0]  # type: ignore[union-attr]
    known = None if column is None or scales.target is aten.ones_like.default else scales  # type: ignore[union-attr]
    indices = (kept, removed, on_grid, removed_on_grid, place)
    options: tuple[Any, ...] = (known, scale, bias, grid, kind, alpha, prefix, eps, column is not None, [])
    x, residual, gain = _stream(x, node)  # type: ignore[arg-type]
    made = low.call(node, low.kernels.propagate, x, residual, near, degree, *indices, *options, gain)
    low.swap(node, low.item(made, 0))
    # Their readers get the kernel's results.
    if column is not None:
        squeezed = only(user for user in column.users if user.target is aten.squeeze.dim and user.args[1] == _FEATURE)
        if squeezed is not None:
            low.swap(squeezed, low.item(made, 1))
    if norm is not None:
        low.swap(norm, low.item(made, 2))


_FEATURE = 2
"""The dimension of features in [B, N, C]."""


def _stream(x: fx.Node, reader: fx.Node) -> tuple[fx.Node, fx.Node | None, fx.Node | None]:
    """Split x = value + residual * gain into its parts, where `reader` alone reads it; else return x, None, None.

    gain: one number per channel, None for 1. Where x has other readers it is written to memory anyway, so adding it up
    again saves nothing.
    """
    found = summands(x) if list(x.users) == [reader] else None
    if found is None:
        return x, None, None
    for branch, stream in (found, found[::-1]):
        scaled = _scaled(branch, x)
        if scaled is not None:
            return stream, *scaled
    return *found, None


def _scaled(branch: fx.Node, reader: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Split `branch` = value * gain, a gain per channel (LayerScale), where `reader` alone reads it; else None."""
    if branch.target is not aten.mul.Tensor or list(branch.users) != [reader]:
        return None
    for value, gain in (branch.args, branch.args[::-1]):
        if not isinstance(value, fx.Node) or not isinstance(gain, fx.Node):
            return None
        whole, few, made = (node.meta["val"] for node in (value, gain, branch))
        per_channel = few.shape[-1:] == whole.shape[-1:] and all(size == 1 for size in few.shape[:-1])
        if per_channel and whole.shape == made.shape and whole.dtype == few.dtype == made.dtype:
            return value, gain
    return None


def _is_column(node: fx.Node) -> bool:
    """Tell whether `node` propagates token scales, which are a stream of one channel without prefix tokens."""
    if node.target is not gtp_fx.propagate.default or node.args[5] != 0:
        return False
    x: Any = node.args[0]
    return x.target is aten.unsqueeze.default and x.args[1] == _FEATURE


def _is_norm(node: fx.Node, of: fx.Node, channels: int) -> bool:
    """Tell whether `node` is a LayerNorm of `of` over its channels."""
    return node.target is aten.layer_norm.default and node.args[0] is of and list(node.args[1]) == [channels]  # type: ignore[arg-type]


def _norm_of(norm: fx.Node | None) -> tuple[Any, Any, float]:
    """Return weight, bias and eps of aten.layer_norm(x, shape, weight, bias, eps); eps is -1 where there is no norm."""
    if norm is None:
        return None, None, -1.0
    given = dict(zip(("weight", "bias", "eps"), norm.args[2:], strict=False)) | dict(norm.kwargs)
    return given.get("weight"), given.get("bias"), given.get("eps", 1e-5)  # type: ignore[return-value]
