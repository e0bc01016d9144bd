"""What ranks tokens that may skip a branch: attention they get in their window, or how they differ from its mean."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import fx
from torch.ops import aten, gtp_fx  # type: ignore[import-not-found]

from gtp_fx.analysis.blocks import AttentionBlock
from gtp_fx.analysis.branches import Branch
from gtp_fx.graph import edit
from gtp_fx.graph.symbols import shape_of
from gtp_fx.passes.exact.attention_layout import Layout
from gtp_fx.passes.exact.build_attention import Sized
from gtp_fx.strategies.protocol import Strategy
from gtp_fx.strategies.sites import Attention, Emit
from gtp_fx.types.axes import Plain
from gtp_fx.types.infer import TypeOf
from gtp_fx.types.layouts import convert, grid_of, made_from


def by_attention(graph: fx.Graph, block: AttentionBlock, branch: Branch, strategy: Strategy) -> fx.Node:
    """Replace the block's attention by one that scores its tokens; return the scores.

    The scores are [images and windows, tokens], in the attention's own order.
    """
    attention = block.attention
    original = Attention.of(attention)

    call = edit.Emitter(graph, like=attention)

    layout = _layout(original.q, branch)
    with graph.inserting_before(attention):

        def arranged(x: fx.Node) -> fx.Node:
            return layout.arranged(call, Sized(x, shape_of(x)), original.q)

        q, k, v = map(arranged, (original.q, original.k, original.v))
        bias = None if original.bias is None else arranged(original.bias)
        operands = replace(original, q=q, k=k, v=v, bias=bias)
        if branch.cells:
            output, scores = strategy.attend_cells(call, operands, block.axis.domain.grid.shape, branch.cells)
        else:
            output, scores = strategy.attend(call, operands, block.axis, True)
        output = layout.restored(call, output, shape_of(attention)[-2:])
    edit.replace(attention, output)
    return scores


def _layout(query: fx.Node, branch: Branch) -> Layout:
    """Return how an attention's operands come to be [images * windows, heads, tokens, features]."""
    shape = shape_of(query)
    first, heads = (math.prod(shape[dim] for dim in dims) for dims in (branch.lead, branch.heads))
    return Layout(shape[:-2], (*branch.lead, *branch.heads), (first, heads))


def arranged_by_window(call: Emit, scores: fx.Node, branch: Branch) -> fx.Node:
    """Bring scores of type `branch.scores` to the region's layout, in which each window's tokens go row by row."""
    feature = (Plain(1),)
    if branch.scores == branch.region:
        return scores
    column = call(aten.unsqueeze.default, scores, 2)
    column = convert(call, column, (*branch.scores, feature), (*branch.region, feature))
    return call(aten.squeeze.dim, column, 2)


def by_activity(call: Emit, branch: Branch, stream: fx.Node, places: fx.Node, type_of: TypeOf) -> fx.Node:
    """Return how far each token is from its window's mean, in the region's layout."""
    kind = type_of(stream)
    rows = convert(call, stream, kind, (*branch.region, kind[-1]))
    patch = [call(aten.ge.Scalar, call(aten.select.int, places, 2, 0), 0)] if is_padded(branch) else []
    return call(gtp_fx.token_activity.default, rows, *patch)


def padding_first(call: Emit, scores: fx.Node, places: fx.Node, branch: Branch) -> fx.Node:
    """Give padding the score -1, so that it skips before any patch does; scores of patches are 0 or more."""
    inside = call(aten.ge.Scalar, call(aten.select.int, places, 2, 0), 0)
    by_image = call(aten.reshape.default, scores, [-1, branch.windows, branch.tokens])
    least = call(aten.sub.Scalar, call(aten.zeros_like.default, by_image), 1.0)
    ranked = call(aten.where.self, inside, by_image, least)
    return call(aten.reshape.default, ranked, [-1, branch.tokens])


def is_padded(branch: Branch) -> bool:
    """Tell whether the branch's windows contain padding."""
    return any(grid.inside is not None for grid in made_from(grid_of(branch.region)))
