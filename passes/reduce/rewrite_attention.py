"""Attention over shortened tokens: each key weighs as many tokens as it stands for, and tokens are scored for a site.

Attention that is one operator is replaced by one that also scores, where its block has a site; attention that is
spelled out stays so, and its map gives the scores. A mean over tokens weighs them by their scales, where the strategy
says so.
"""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.ops import aten, gtp_fx  # type: ignore[import-not-found]

from gtp_fx.analysis.attention_maps import AttentionMap
from gtp_fx.analysis.blocks import AttentionBlock
from gtp_fx.analysis.marks import MARK
from gtp_fx.analysis.queries_and_keys import keys_beside
from gtp_fx.graph import edit
from gtp_fx.passes.reduce.walk import Walk
from gtp_fx.strategies.sites import Attention
from gtp_fx.types.axes import images_dims, token_axis

ATTENDS = "gtp_attends"
"""Meta key of an attention that the strategy put in the place of torch's: its operands."""


def rewrite_attention(walk: Walk, node: fx.Node) -> None:
    """Give attention the token scales of its keys, and let it score its tokens where its block has a site."""
    attention = Attention.of(node)
    keys = token_axis(walk.wanted(node, 1)[-2])
    block = walk.blocks.get(node)
    emit = edit.Emitter(walk.graph, like=node, before=node)
    state = walk.states[keys.domain.grid][keys.domain.level] if keys is not None and keys.domain.level else None
    # Scales enter as a bias on the keys' logits: log of the scale.
    bias = attention.bias
    strategy = walk.plan.strategy
    if keys is not None and state is not None and strategy.reads_scales:
        bias = emit(gtp_fx.key_bias.default, state.scale, keys.prefix, keys.suffix, bias, attention.q)
    beside = keys_beside(walk.wanted(node, 0), walk.wanted(node, 1)) or (0, 0)
    operands = Attention(attention.q, attention.k, attention.v, bias, attention.scale, beside)
    if block is not None:
        walk.attention[block.index] = operands
    scored = block is not None and block.index in walk.plan.removed and strategy.score != "none"
    if block is not None and (scored or strategy.rewrites_every_attention):
        output, walk.scores[block.index] = strategy.attend(emit, operands, block.axis, scored)
        output.meta[MARK], output.meta[ATTENDS] = node.meta[MARK], operands
        node.replace_all_uses_with(output)
        walk.replacement[node] = output
        walk.graph.erase_node(node)  # dead code elimination keeps attention, which may draw random numbers
    elif bias is not attention.bias:
        edit.set_args(node, (*node.args[:3], bias, *node.args[4:]))


def tell_scales(walk: Walk, node: fx.Node, attended: AttentionMap) -> None:
    """Let attention that is spelled out weigh a key by how many tokens it stands for.

    That adds log s to a softmax's logits, as in the operator. Weights without a softmax are multiplied by s.
    """
    keys = token_axis(walk.wanted(node, 0)[-1])
    if keys is None or not keys.domain.level or not walk.plan.strategy.reads_scales:
        return
    scale = walk.states[keys.domain.grid][keys.domain.level].scale
    emit = edit.Emitter(walk.graph, like=node, before=node)
    values, *rest = node.args
    if attended.softmax is not None:
        weighed = emit(gtp_fx.key_bias.default, scale, keys.prefix, keys.suffix, values, values)
    else:
        logs = emit(gtp_fx.key_bias.default, scale, keys.prefix, keys.suffix, None, values)
        weighed = emit(aten.mul.Tensor, values, emit(aten.exp.default, logs))
    edit.set_args(node, (weighed, *rest))


def score_by_map(walk: Walk, block: AttentionBlock) -> None:
    """Score the tokens of a block whose attention is spelled out, where it has a site."""
    if block.index not in walk.plan.removed or block.map is None:
        return
    emit = edit.Emitter(walk.graph, like=block.attention, before=block.attention)
    logits: Any = block.map.logits.args
    keys = emit(aten.transpose.int, logits[1], -2, -1)
    values: Any = block.attention.args[1]
    walk.attention[block.index] = Attention(logits[0], keys, values, None, None)
    if walk.plan.strategy.score != "none":
        around = (walk.plan.strategy.score, block.axis.prefix, block.axis.suffix)
        walk.scores[block.index] = emit(gtp_fx.scores_of_map.default, block.map.scored, *around)


def rewrite_pooling(walk: Walk, node: fx.Node) -> None:
    """Weight a mean over shortened tokens by their scales."""
    kind = walk.wanted(node, 0)
    arguments: tuple[Any, ...] = node.args
    x, reduced, *keepdim = arguments
    dims = [dim % len(kind) for dim in reduced]
    axis = token_axis(kind[dims[0]]) if len(dims) == 1 else None
    if axis is None or not axis.domain.level:
        return
    images = images_dims(kind, walk.typing.images[axis.domain.grid])[0]
    scale = walk.states[axis.domain.grid][axis.domain.level].scale
    emit = edit.Emitter(walk.graph, like=node, before=node)
    around = (images, dims[0], axis.prefix, axis.suffix, keepdim == [True])
    walk.replacement[node] = emit(gtp_fx.weighted_mean.default, x, scale, *around)
    node.replace_all_uses_with(walk.replacement[node])
