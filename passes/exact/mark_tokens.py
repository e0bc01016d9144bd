"""Exact: mark arguments that are streams of tokens, in a graph that has no patches of its own.

What follows a graph break begins with tokens: no convolution, no grid. So does an encoder without its embedding. Each
argument [B, N, C] is taken for tokens on trial; it is marked where the graph's attention blocks then turn out to run
over it, by the same types and rules as blocks over patches, and where their attention is that of an image's tokens
(`gtp_fx.analysis.token_inputs`). A graph in which patches are born keeps them as its only tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from gtp_fx.analysis.blocks import AttentionBlock
from gtp_fx.analysis.token_inputs import argument_rank_fits, tokens_of, why_no_image
from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.analysis.unsupported_attention import NO_TOKENS
from gtp_fx.graph.edit import copy_of
from gtp_fx.graph.nodes import count_nodes
from gtp_fx.graph.operators import ATTENTION, SOFTMAXES
from gtp_fx.graph.verify import propagate_shapes
from gtp_fx.passes.exact.fuse_attention import fuse_attention
from gtp_fx.passes.exact.mark_blocks import mark_blocks
from gtp_fx.passes.exact.rows_as_batch import ROWS, rows_as_batch
from gtp_fx.types.infer import TOKENS


def mark_tokens(gm: fx.GraphModule, prefix: int | None = None) -> fx.GraphModule:
    """Return a copy of `gm` whose token arguments are marked; `gm` itself where there is nothing to try.

    prefix: prefix tokens of each, where the user said how many.
    """
    if not count_nodes(gm.graph, (*ATTENTION, *SOFTMAXES)):
        return gm
    names = [node.name for node in gm.graph.nodes if argument_rank_fits(node)]
    rows = gm if names else rows_as_batch(gm)
    if (not names and rows is gm) or blocks_of(with_blocks_marked(gm)):
        return gm
    if names:
        return _marked(gm, names, prefix)
    propagate_shapes(rows, after=rows_as_batch.__name__)
    marked = _marked(rows, [node.name for node in rows.graph.nodes if ROWS in node.meta], prefix)
    return gm if marked is rows else marked


def _marked(gm: fx.GraphModule, names: Sequence[str], prefix: int | None) -> fx.GraphModule:
    """Return a copy of `gm` in which those of some values that are tokens are marked; `gm` where none is."""
    for name in names:
        trial = copy_of(gm)
        tokens = _named(trial, name)
        axis = tokens_of(tokens, prefix)
        if isinstance(axis, str):
            if axis:
                tokens.meta[NO_TOKENS] = axis
                gm = trial
            continue
        tokens.meta[TOKENS] = axis
        spelled = with_blocks_marked(trial)
        # A block at which nothing can be removed proves nothing: channels may have been taken for tokens.
        if not any(b.axis.domain.grid == axis.domain.grid and b.refusal is None for b in blocks_of(spelled)):
            continue
        if reason := why_no_image(_named(spelled, name), spelled):
            del tokens.meta[TOKENS]
            tokens.meta[NO_TOKENS] = reason
        gm = trial
    return gm


def with_blocks_marked(gm: fx.GraphModule) -> fx.GraphModule:
    """Return the graph with its attention in one spelling and its blocks marked, as the next passes would make it."""
    fused = fuse_attention(gm)
    if fused is not gm:
        propagate_shapes(fused, after=fuse_attention.__name__)
    return mark_blocks(fused)


def blocks_of(gm: fx.GraphModule) -> tuple[AttentionBlock, ...]:
    return typed_graph(gm.graph).blocks


def _named(gm: fx.GraphModule, name: str) -> fx.Node:
    (found,) = (node for node in gm.graph.nodes if node.name == name)
    assert isinstance(found, fx.Node)
    return found
