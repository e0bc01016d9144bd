"""Exact: GTP's operators as the Triton kernels of `gtp_fx.kernels`, for graphs that run on a GPU.

Run last, on what is about to be compiled; plain ATen stays what users see, export and run elsewhere. Operators that belong together
become one kernel:

    key_bias and attention                          attend, where attention keeps no stock kernel for want of a mask that it takes
    attention_with_scores                           attend
    select and where its tokens are on the grid     select
    propagate, of tokens and of scales, and a norm  propagate
    region_shares, recover and a residual add       recover

What a kernel isn't made for (another rank, theta < 1, heads of 256, merging) stays as it is: composite operators run everywhere.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch.ops import aten, gtp_fx  # type: ignore[import-not-found]

from gtp_fx import graphs
from gtp_fx.shapes import propagate_shapes
from gtp_fx.sizes import shape_of


def lower_to_kernels(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of `gm` that calls kernels. Raises ImportError where Triton isn't installed."""
    gm = graphs.copy_of(gm)
    lowering = _Lowering(gm.graph, load_kernels())
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target in _LOWERINGS:
            _LOWERINGS[node.target](lowering, node)
    for node in lowering.instead:  # so far they had the shapes of what they stand for
        node.meta.pop("val", None)
    gm = graphs.finish(gm)
    propagate_shapes(gm, after="lower_to_kernels")
    return gm


@dataclass(frozen=True)
class Kernels:
    """What a lowering has to choose from: operators, and what they are made for."""

    attend: Any
    select: Any
    propagate: Any
    recover: Any
    heads: tuple[int, int]
    most_cells: int
    most_channels: int


def load_kernels() -> Kernels:
    """Registers them. Raises ImportError where Triton isn't installed."""
    attention, select, propagate, recover = (
        importlib.import_module(f"gtp_fx.kernels.{name}") for name in ("attention", "select", "propagate", "recover")
    )
    return Kernels(
        attend=attention.attend._opoverload,
        select=select.select._opoverload,
        propagate=propagate.propagate._opoverload,
        recover=recover.recover._opoverload,
        heads=attention.HEADS,
        most_cells=select.MOST_CELLS,
        most_channels=propagate.MOST_CHANNELS,
    )


@dataclass
class _Lowering:
    """The walk's state. instead: new nodes that have taken old ones' places. maps: by the index of a level's tokens into the
    grid, the map that `select` left, and the grid's cells."""

    graph: fx.Graph
    kernels: Kernels
    instead: list[fx.Node] = field(default_factory=list)
    maps: dict[fx.Node, tuple[fx.Node, int]] = field(default_factory=dict)

    def call(self, before: fx.Node, target: Any, *args: Any) -> fx.Node:
        with self.graph.inserting_before(before):
            return graphs.call(self.graph, target, *args, like=before)

    def item(self, of: fx.Node, index: int) -> fx.Node:
        """One of several results."""
        return self.call(of.next, operator.getitem, of, index)

    def swap(self, old: fx.Node, new: fx.Node) -> fx.Node:
        new.meta["val"] = old.meta["val"]
        self.instead.append(new)
        old.replace_all_uses_with(new)
        return new


def _attention(low: _Lowering, node: fx.Node) -> None:
    """Stock attention keeps its kernel, but where token scales are its mask: fused attention takes none that is any good."""
    options = dict(zip(("attn_mask", "dropout_p", "is_causal"), node.args[3:], strict=False)) | dict(node.kwargs)
    if any(options.get(option) for option in ("dropout_p", "is_causal", "enable_gqa")):
        return
    if _scales_of(options.get("attn_mask")) is not None:
        made = _attend(low, node, options["attn_mask"], options.get("scale"), "none", 0, 0)
        if made is not None:
            low.swap(node, low.item(made, 0))


def _scored_attention(low: _Lowering, node: fx.Node) -> None:
    _, _, _, bias, scale, sparsity, score, prefix, suffix, *rest = node.args
    thresholds = rest[0] if rest else None
    if sparsity == 1.0 or thresholds is not None:
        made = _attend(low, node, bias, scale, score, prefix, suffix, thresholds=thresholds)
        if made is not None:
            low.swap(node, made)


def _attend(
    low: _Lowering, node: fx.Node, bias: Any, scale: Any, score: Any, *around: Any, thresholds: Any = None
) -> fx.Node | None:
    """In place of `node`, whose first operands are q, k and v; None where the kernel isn't made for them."""
    q, k, v, *_ = node.args
    scales = _scales_of(bias)
    if scales is not None:
        scales, *around, bias, _ = bias.args  # type: ignore[assignment]
    sizes = [shape_of(x) for x in (q, k, v)]  # type: ignore[arg-type]
    least, most = low.kernels.heads
    if any(len(size) != 4 or not least <= size[-1] <= most or size[1] != sizes[0][1] for size in sizes):
        return None
    return low.call(node, low.kernels.attend, q, k, v, bias, scales, thresholds, scale, score, *around, [])


def _scales_of(bias: Any) -> fx.Node | None:
    is_told = isinstance(bias, fx.Node) and bias.target is gtp_fx.key_bias.default
    return bias.args[0] if is_told else None


def _select(low: _Lowering, node: fx.Node) -> None:
    """With the two gathers that say where tokens are on the whole grid, where some have left before."""
    score, count = node.args
    kept, left = (_one(user for user in node.users if user.args[1] == index) for index in (0, 1))
    if kept is None or left is None:
        return
    cells, before = shape_of(score)[1], None  # type: ignore[arg-type]
    gathers = [_one(user for user in part.users if _is_index(user, part)) for part in (kept, left)]
    known = {gather.args[0] for gather in gathers if gather is not None} & low.maps.keys()
    if None not in gathers and len(known) == 1:
        before, cells = low.maps[known.pop()]  # type: ignore[index]
    if cells > low.kernels.most_cells:
        return
    made = low.call(node, low.kernels.select, score, before, count, cells)
    on_grid = kept = low.swap(kept, low.item(made, 0))
    low.swap(left, low.item(made, 1))
    if before is not None:
        on_grid, _ = (low.swap(gather, low.item(made, place)) for gather, place in zip(gathers, (2, 3), strict=True))  # type: ignore[arg-type]
    low.maps[on_grid] = low.item(made, 4), cells


def _is_index(node: fx.Node, part: fx.Node) -> bool:
    """Whether `node` is where the tokens `part` stand on the grid: their entries of the index of all."""
    return node.target is aten.gather.default and node.args[1:3] == (1, part)


def _propagate(low: _Lowering, node: fx.Node) -> None:
    """The stream's, with its scales' and the norm that reads it."""
    x, weights, kept, left, alpha, prefix, *own = node.args
    of_a_graph = weights.target is gtp_fx.propagation_weights.default  # type: ignore[union-attr]
    if own or not of_a_graph or _is_column(node):
        return
    near, degree, on_grid, left_on_grid, grid, kind = weights.args  # type: ignore[union-attr]
    channels = shape_of(x)[-1]  # type: ignore[arg-type]
    if on_grid not in low.maps or channels > low.kernels.most_channels or len(grid) > _MOST_SIDES:  # type: ignore[arg-type]
        return
    place, _ = low.maps[on_grid]  # type: ignore[index]
    norm = next((user for user in node.users if _is_norm(user, node, channels)), None)
    scale, bias, eps = _norm_of(norm)
    column = _one(user for user in weights.users if _is_column(user) and user.args[2:5] == (kept, left, alpha))  # type: ignore[union-attr]
    scales = None if column is None else column.args[0].args[0]  # type: ignore[union-attr]
    known = None if column is None or scales.target is aten.ones_like.default else scales  # type: ignore[union-attr]
    indices = (kept, left, on_grid, left_on_grid, place)
    told = (known, scale, bias, grid, kind, alpha, prefix, eps, column is not None)
    made = low.call(node, low.kernels.propagate, x, near, degree, *indices, *told)
    low.swap(node, low.item(made, 0))
    if column is not None:
        squeezed = _one(user for user in column.users if user.target is aten.squeeze.dim and user.args[1] == _FEATURE)
        if squeezed is not None:
            low.swap(squeezed, low.item(made, 1))
    if norm is not None:
        low.swap(norm, low.item(made, 2))


_MOST_SIDES, _FEATURE = 3, 2


def _is_column(node: fx.Node) -> bool:
    """Scales travel as a stream of one channel without prefix tokens."""
    if node.target is not gtp_fx.propagate.default or node.args[5] != 0:
        return False
    x: Any = node.args[0]
    return x.target is aten.unsqueeze.default and x.args[1] == _FEATURE


def _is_norm(node: fx.Node, of: fx.Node, channels: int) -> bool:
    return node.target is aten.layer_norm.default and node.args[0] is of and list(node.args[1]) == [channels]  # type: ignore[arg-type]


def _norm_of(norm: fx.Node | None) -> tuple[Any, Any, float]:
    """Weight, bias and eps of aten.layer_norm(x, shape, weight, bias, eps); eps -1 for no norm."""
    if norm is None:
        return None, None, -1.0
    given = dict(zip(("weight", "bias", "eps"), norm.args[2:], strict=False)) | dict(norm.kwargs)
    return given.get("weight"), given.get("bias"), given.get("eps", 1e-5)  # type: ignore[return-value]


def _recover(low: _Lowering, node: fx.Node) -> None:
    """With the residual add, where that reads it at once."""
    x, shares, kept, left, *order = node.args
    if order[:2] != [0, 1] or len(shape_of(x)) != 3:  # type: ignore[arg-type]
        return
    places = None
    if shares.target is gtp_fx.region_shares.default:  # type: ignore[union-attr]
        places, shares = shares.args[0], None  # type: ignore[union-attr]
    add = _one(iter(node.users))
    residual = None if add is None else _residual(add, node)
    after = node if residual is None else add
    assert after is not None
    made = low.call(after, low.kernels.recover, x, shares, places, residual, kept, left, *order[2:])
    low.swap(after, made)


def _residual(add: fx.Node, to: fx.Node) -> fx.Node | None:
    """What `add` adds to `to`, of the same shape and dtype."""
    if add.target is not aten.add.Tensor or add.kwargs:
        return None
    other = _one(value for value in add.args if value is not to)
    if not isinstance(other, fx.Node):
        return None
    own, theirs = to.meta["val"], other.meta["val"]
    return other if (own.shape, own.dtype) == (theirs.shape, theirs.dtype) else None


def _one(values: Iterable[Any]) -> Any:
    """The only one; None where there are none or several."""
    found = list(values)
    return found[0] if len(found) == 1 else None


_LOWERINGS = {
    aten.scaled_dot_product_attention.default: _attention,
    gtp_fx.attention_with_scores.default: _scored_attention,
    gtp_fx.select.default: _select,
    gtp_fx.propagate.default: _propagate,
    gtp_fx.recover.default: _recover,
}
