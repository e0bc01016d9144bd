"""Exact: split a fused projection whose parts are live for different tokens.

    linear [B, N, 3C] ─ view [B, N, 3, H, D] ─ permute ─ select ×3 ─ q (1 token live), k, v (all)
becomes
    linear(W[:C])  ─ … ─ q          so that `drop_dead_tokens` can compute it for one token
    linear(W[C:])  ─ … ─ k, v

The parts may also be slices of the projection's features. `normalise` has made splits, chunks and unbinds these two.
The weights are views of the fused parameter: nothing is copied, gradients reach it, `state_dict` doesn't change.
"""

from __future__ import annotations

import itertools
from typing import Any

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.analysis.fused_projections import FusedProjection, match_fused
from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.capture.layers import stays_whole
from gtp_fx.graph import edit


def split_projections(gm: fx.GraphModule, needs_full_maps: bool = False) -> fx.GraphModule:
    """Return a copy of `gm` in which parts of a fused projection with different liveness are separate projections.

    `gm` itself where the parts of each projection are live for the same tokens.

    needs_full_maps: keep every query of the marked blocks' attention live, for a strategy that reads whole maps.
    """
    needed = typed_graph(gm.graph).live(needs_full_maps).needed
    differing = {}
    for node in gm.graph.nodes:
        fused = match_fused(node)
        if fused is not None and not stays_whole(gm, node):
            needs = [needed.get(part.node, 0) for part in fused.parts]
            if len(set(needs)) > 1:
                differing[node] = needs
    if not differing:
        return gm
    gm, copies = edit.copy_with_nodes(gm)
    for node, needs in differing.items():
        fused = match_fused(copies[node])
        assert fused is not None
        _split(gm.graph, fused, needs)
    return edit.finish(gm)


def keep_rows_read(graph: fx.Graph, linear: fx.Node) -> None:
    """Compute no rows of a fused projection that nothing reads, in place.

    Raises AssertionError where `match_fused` finds none.
    """
    fused = match_fused(linear)
    assert fused is not None
    # Rows that are read end at a gap.
    gaps = [first.stop != second.start for first, second in itertools.pairwise(fused.parts)]
    _split(graph, fused, list(itertools.accumulate(gaps, initial=0)))


def _split(graph: fx.Graph, fused: FusedProjection, needs: list[int]) -> None:
    """Replace the fused projection by one for each run of parts that are live for the same tokens."""
    x, weight, *rest = fused.linear.args
    bias = rest[0] if rest else None
    numbered = list(zip(fused.parts, needs, strict=True))
    for _, run in itertools.groupby(numbered, key=lambda pair: pair[1]):
        parts = [part for part, _ in run]
        first, last = parts[0].start, parts[-1].stop
        rows = (first * fused.rows, last * fused.rows)
        emit = edit.Emitter(graph, like=fused.linear, before=(fused.permute or fused.view or fused.linear).next)
        new_bias = bias and emit(aten.slice.Tensor, bias, 0, *rows)
        new: Any = emit(aten.linear.default, x, emit(aten.slice.Tensor, weight, 0, *rows), new_bias)
        # The same view and permutation as before, on fewer units.
        if fused.view is not None:
            sizes: list[Any] = list(fused.view.args[1])  # type: ignore[arg-type]
            sizes[fused.unit_dim] = last - first
            new = emit(fused.view.target, new, sizes)
        if fused.permute is not None:
            new = emit(fused.permute.target, new, *fused.permute.args[1:])
        for part in parts:
            _, dim, *_ = part.node.args
            if part.node.target is aten.select.int:
                part.node.args = (new, dim, part.start - first)
            else:
                part.node.args = (new, dim, part.start - first, part.stop - first)
