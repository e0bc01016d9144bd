"""Approximate: let tokens leave. The strategy's operators go in at each site, what follows is repaired from types.

The graph is typed with the plan's sites, then walked once in order. At each node:
  1. arguments that hold sizes are recomputed from the types and the plan's token counts;
  2. attention over shortened keys is told their token scales, and where its block has a site it is replaced by one that
     also scores its tokens;
  3. behind a site, the shortened stream takes the place of the whole one for every later reader.
Where a node asks for other tokens than reach it, `misfits` says so beforehand, and no plan is made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch.ops import gtp_fx  # type: ignore[import-not-found]

from gtp_fx import graphs
from gtp_fx.axes import Dim, Grid, token_axes, token_axis
from gtp_fx.errors import Refusal
from gtp_fx.infer import Typing, infer_types
from gtp_fx.passes.find_blocks import ATTENTION, AttentionBlock, read_blocks
from gtp_fx.plan import Plan
from gtp_fx.strategies.protocol import Attention, StreamState


def insert_propagation(gm: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """A copy of `gm`, whose blocks are marked, in which the plan's tokens leave at the plan's sites."""
    gm = graphs.copy_of(gm)
    blocks = read_blocks(gm)
    sites = {block.site: block for block in blocks if block.index in plan.propagated and block.site is not None}
    typing = infer_types(gm.graph, frozenset(sites))
    walk = _Walk(gm.graph, plan, typing, {block.attention: block for block in blocks})
    for node in list(gm.graph.nodes):
        answer = typing.answers.get(node)
        if answer is None:
            continue
        if answer.repair is not None:
            graphs.set_args(node, answer.repair(plan.count))
        if node.target in ATTENTION:
            walk.rewrite_attention(node)
        if node in sites:
            walk.shorten_behind(sites[node])
    return graphs.finish(gm)


def misfits(typing: Typing) -> list[Refusal]:
    """Every place that asks for tokens which have left by then: an operator without a rule, a map that is returned."""
    found = []
    for node, answer in typing.answers.items():
        for operand, wanted in answer.operands.items():
            if all(_fits(mine, theirs) for mine, theirs in zip(typing.type(operand), wanted, strict=True)):
                continue
            if node.op == "output":
                reason = f"the model returns a token map ({operand.name}), tokens and all, and some have left"
            else:
                reason = answer.barrier or f"it reads {operand.name} at another level of the stream than it comes in"
            found.append(Refusal(graphs.layer_name(node), graphs.operator_name(node), reason))
    return found


def _fits(own: Dim, wanted: Dim) -> bool:
    """A plain operand beside a whole token axis fits as it is; beside a shortened one it doesn't."""
    levels = [axis.domain.level for axis in token_axes((wanted,))]
    return own == wanted or (not token_axes((own,)) and not any(levels))


@dataclass
class _Walk:
    """The walk's state. states: the strategy's, by stream. scores: of the attention of each block with a site."""

    graph: fx.Graph
    plan: Plan
    typing: Typing
    blocks: dict[fx.Node, AttentionBlock]
    states: dict[Grid, StreamState] = field(default_factory=dict)
    scores: dict[int, fx.Node] = field(default_factory=dict)

    def rewrite_attention(self, node: fx.Node) -> None:
        """Tell `node` the token scales of its keys; make it score its tokens where its block needs that."""
        attention = _operands(node)
        keys = token_axis(self.typing.answers[node].operands[node.args[1]][-2])  # type: ignore[index]
        block = self.blocks.get(node)
        emit = _Emitter(self.graph, before=node, like=node)
        state = self.states.get(keys.domain.grid) if keys is not None and keys.domain.level else None
        bias = attention.bias
        if keys is not None and state is not None and state.scale is not None:
            bias = emit(gtp_fx.key_bias.default, state.scale, keys.prefix, bias, attention.q)
        scored = block is not None and block.index in self.plan.propagated
        if block is not None and (scored or self.plan.strategy.rewrites_every_attention):
            operands = Attention(attention.q, attention.k, attention.v, bias, attention.scale)
            output, self.scores[block.index] = self.plan.strategy.attend(emit, operands, block.axis.prefix, scored)
            node.replace_all_uses_with(output)
            self.graph.erase_node(node)  # dead code elimination leaves it: attention may draw random numbers
        elif bias is not attention.bias:
            graphs.set_args(node, (*node.args[:3], bias, *node.args[4:]))

    def shorten_behind(self, block: AttentionBlock) -> None:
        """Insert the site of `block` behind its residual add, and give its result to every later reader."""
        site, grid = block.site, block.axis.domain.grid
        assert site is not None
        if grid not in self.states:
            self.states[grid] = self._start(grid)
        emit = _Emitter(self.graph, before=site.next, like=site)
        shorter, self.states[grid] = self.plan.strategy.reduce(
            emit, self.states[grid], site, self.scores[block.index], self.plan.propagated[block.index], block.axis
        )
        site.replace_all_uses_with(shorter, delete_user_cb=lambda user: user not in emit.inserted)

    def _start(self, grid: Grid) -> StreamState:
        """The strategy's state of a stream, from what enters its first block, wherever its first site is."""
        first = next(block for block in self.blocks.values() if block.axis.domain.grid == grid)
        assert first.stream is not None
        emit = _Emitter(self.graph, before=first.stream.next, like=first.stream)
        return self.plan.strategy.start(emit, first.stream, first.axis)


@dataclass
class _Emitter:
    """An `Emit` that inserts before a node, in order, with the origin of another."""

    graph: fx.Graph
    before: fx.Node
    like: fx.Node
    inserted: set[fx.Node] = field(default_factory=set)

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        with self.graph.inserting_before(self.before):
            node = graphs.call(self.graph, target, *args, like=self.like)
        self.inserted.add(node)
        return node


def _operands(node: fx.Node) -> Attention:
    """The operands of aten.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, *, scale)."""
    q, k, v, *rest = node.args
    bias = rest[0] if rest else node.kwargs.get("attn_mask")
    return Attention(q, k, v, bias, node.kwargs.get("scale"))  # type: ignore[arg-type]
