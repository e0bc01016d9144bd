"""Exact: split a fused projection whose parts are live for different tokens.

    linear [B, N, 3C] ─ view [B, N, 3, H, D] ─ permute ─ unbind ─ q (1 token live), k, v (all)
becomes
    linear(W[:C])  ─ … ─ q          so that `drop_dead_tokens` can compute it for one token
    linear(W[C:])  ─ … ─ k, v

The weights are views of the fused parameter: nothing is copied, gradients reach it, `state_dict` doesn't change.
"""

from __future__ import annotations

import itertools
import math
import operator
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.graph import edit
from gtp_fx.graph.symbols import shape_of
from gtp_fx.types.rules.layout import is_view


@dataclass(frozen=True)
class FusedProjection:
    """Nodes linear → view → (permute) → unbind, where the view's outermost split of the features is into equal parts.

    linear: the projection.
    view: splits its features.
    permute: None where there is none.
    unbind: takes the parts.
    part_dim: the view's dimension that counts the parts.
    parts: how many parts there are.
    """

    linear: fx.Node
    view: fx.Node
    permute: fx.Node | None
    unbind: fx.Node
    part_dim: int
    parts: int


def split_projections(gm: fx.GraphModule, needs_full_maps: bool = False) -> fx.GraphModule:
    """Return a copy of `gm` in which parts of a fused projection with different liveness are separate projections.

    `gm` itself where the parts of each projection are live for the same tokens.

    needs_full_maps: keep every query of the marked blocks' attention live, for a strategy that reads whole maps.
    """
    needed = typed_graph(gm.graph).live(needs_full_maps).needed
    differing = {}
    for node in gm.graph.nodes:
        fused = match_fused(node)
        if fused is not None:
            items = _items(node)
            needs = [needed.get(items[i], 0) if i in items else 0 for i in range(fused.parts)]
            if len(set(needs)) > 1:
                differing[node] = needs
    if not differing:
        return gm
    gm, copies = edit.copy_with_nodes(gm)
    for node, needs in differing.items():
        fused = match_fused(copies[node])
        assert fused is not None
        _split(gm.graph, fused, needs, _items(copies[node]))
    return edit.finish(gm)


def _items(unbind: fx.Node) -> dict[int, fx.Node]:
    """Return the node that takes each part, by the part's number."""
    return {user.args[1]: user for user in unbind.users}  # type: ignore[misc]


def match_fused(unbind: fx.Node) -> FusedProjection | None:
    """Return the fused projection that ends in this unbind; None where it ends none."""
    if unbind.target is not aten.unbind.int or any(user.target is not operator.getitem for user in unbind.users):
        return None
    source = unbind.args[0]
    assert isinstance(source, fx.Node)
    permute = source if source.target is aten.permute.default else None
    view = permute.args[0] if permute is not None else source
    if not isinstance(view, fx.Node) or not is_view(view):
        return None
    linear = view.args[0]
    if not isinstance(linear, fx.Node) or linear.target is not aten.linear.default:
        return None
    # Nothing else may read the whole projection, and the parts have to be runs of rows of its weight.
    if any(len(node.users) != 1 for node in (linear, view, *([permute] if permute else []))):
        return None
    dim = (unbind.args[1] if len(unbind.args) > 1 else 0) % len(shape_of(source))  # type: ignore[operator]
    part_dim: Any = permute.args[1][dim] if permute is not None else dim  # type: ignore[index]
    shape = shape_of(view)
    if math.prod(list(shape[part_dim:])) != shape_of(linear)[-1]:
        return None
    return FusedProjection(linear, view, permute, unbind, part_dim, shape[part_dim])


def _split(graph: fx.Graph, fused: FusedProjection, needs: list[int], items: dict[int, fx.Node]) -> None:
    """Replace the fused projection by one for each run of parts that are live for the same tokens."""
    x, weight, *rest = fused.linear.args
    bias = rest[0] if rest else None
    width = shape_of(fused.linear)[-1] // fused.parts
    for _, run in itertools.groupby(range(fused.parts), key=lambda part: needs[part]):
        parts = list(run)
        with graph.inserting_before(fused.unbind):
            rows = (parts[0] * width, (parts[-1] + 1) * width)
            like = fused.linear
            new: Any = edit.call(graph, aten.slice.Tensor, weight, 0, *rows, like=like)
            new_bias = bias and edit.call(graph, aten.slice.Tensor, bias, 0, *rows, like=like)
            new = edit.call(graph, aten.linear.default, x, new, new_bias, like=like)
            # The same view, permute and unbind as before, on fewer parts.
            sizes: list[Any] = list(fused.view.args[1])  # type: ignore[arg-type]
            sizes[fused.part_dim] = len(parts)
            new = edit.call(graph, fused.view.target, new, sizes, like=fused.view)
            if fused.permute is not None:
                new = edit.call(graph, aten.permute.default, new, fused.permute.args[1], like=fused.permute)
            new = edit.call(graph, aten.unbind.int, new, *fused.unbind.args[1:], like=fused.unbind)
            for position, part in enumerate(parts):
                if part in items:
                    item = edit.call(graph, operator.getitem, new, position, like=fused.unbind)
                    items[part].replace_all_uses_with(item)
