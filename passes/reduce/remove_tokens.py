"""Approximate: remove tokens. The strategy's operators are inserted at sites, and later nodes are repaired from types.

The graph is typed with the plan's sites, then walked once in order. At each node:
  1. An operand at another level than the node needs is coerced (`gtp_fx.types.coercions`): of older values the
     remaining tokens are taken, and in newer ones the removed tokens are recovered.
  2. Arguments that are sizes are recomputed from the types and the plan's token counts.
  3. Attention over shortened keys gets their token scales. Where its block has a site, it is replaced by an attention
     that also scores its tokens; attention that is spelled out stays so, and its map gives the scores.
  4. After a site, every later reader gets the shortened stream instead of the whole one.
Outputs that later layers read are tied to what those read (`tie_outputs`), for gradients.

The level of a stream is the number of its sites so far; at level 0 it has all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch.ops import aten, gtp_fx  # type: ignore[import-not-found]

from gtp_fx.analysis.attention_maps import AttentionMap
from gtp_fx.analysis.blocks import AttentionBlock
from gtp_fx.analysis.branches import keys_beside
from gtp_fx.analysis.marks import MARK
from gtp_fx.analysis.placement import cut_of, ends_of, updated_edges
from gtp_fx.analysis.returned_tokens import returned_tokens
from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.errors import UnsupportedModelError
from gtp_fx.graph import edit
from gtp_fx.graph.operators import ATTENTION
from gtp_fx.graph.torch_internals import is_higher_order
from gtp_fx.passes.reduce.tie_outputs import tie_outputs
from gtp_fx.plan.plan import Plan
from gtp_fx.strategies.protocol import AtSite, Attention, StreamState
from gtp_fx.types.axes import TensorType, images_dims, token_axis
from gtp_fx.types.coercions import Coercion, Step, find_coercions
from gtp_fx.types.grids import Grid
from gtp_fx.types.infer import SiteTyping, infer_with_sites
from gtp_fx.types.places import home_of, places_of

SITE = "gtp_site"
"""Meta key of a node after which tokens have been removed: the grid they were on, the state of what remains, and the
node of all patches' places (`gtp_fx.types.places`), None where they are in order."""

ATTENDS = "gtp_attends"
"""Meta key of an attention that the strategy put in the place of torch's: its operands."""

RETURNED = "gtp_returned"
"""Meta key of the output node of a rewritten graph: the outputs that run over tokens, each with those that are left."""

RECOVERED = "gtp_recovered"
"""Meta key of a value in which removed tokens have been put back for a reader."""


def remove_tokens(gm: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """Return a copy of `gm`, whose blocks are marked, in which the plan's tokens are removed at the plan's sites.

    Raises UnsupportedModelError where something needs tokens that the plan's sites alone leave it no way to get.
    """
    # The original's analyses are cached, so they are read there and carried over to the copy.
    typed = typed_graph(gm.graph)
    ends_before = ends_of(typed, plan.strategy)
    edges_before = updated_edges(typed, plan.strategy, ends_before)
    gm, copies = edit.copy_with_nodes(gm)
    blocks = [block.copied(copies) for block in typed.blocks]
    sites = {cut_of(block, plan.strategy): block for block in blocks if block.index in plan.removed}
    ends = {copies[node]: grid for node, grid in ends_before.items()}
    edges = frozenset((copies[reader], copies[stream]) for reader, stream in edges_before)
    # Types say at which level each operand comes and is needed; coercions are the differences.
    typing = infer_with_sites(gm.graph, frozenset(filter(None, sites)), frozenset(ends), edges)
    found = find_coercions(typing)
    if found.refused:  # `find_sites` has checked all sites together, and a plan may use fewer
        raise UnsupportedModelError(
            "tokens can't be removed by this schedule: operators that need all of them, or those that remain, can't "
            "get them (another schedule, schedule=[…], may do; flops_budget=1.0 works)",
            found.refused,
        )
    gm.graph.output_node().meta[RETURNED] = returned_tokens(typing)
    coercions = found.by_node()
    args = {node: node.args for node in gm.graph.nodes}
    maps = [block.map for block in blocks if block.map is not None]
    weighing = {attended.product if attended.softmax is None else attended.softmax: attended for attended in maps}
    walk = _Walk(gm.graph, plan, typing, {block.attention: block for block in blocks}, weighing, args)
    # The nodes as they are now: the walk inserts others, which need no repair.
    for node in list(gm.graph.nodes):
        answer = typing.results.get(node)
        if answer is None:
            continue
        for coercion in coercions.get(node, ()):
            walk.coerce(coercion)
        if answer.repair is not None:
            edit.set_args(node, answer.repair(plan.count))
        if node.target in ATTENTION:
            walk.rewrite_attention(node)
        elif node in walk.weighing:
            walk.tell_scales(node, walk.weighing[node])
        if node.target not in ATTENTION and node in walk.blocks:
            walk.score_by_map(walk.blocks[node])
        if node.target is aten.mean.dim and plan.strategy.weighted_pooling:
            walk.rewrite_pooling(node)
        if node in sites:
            walk.shorten_after(node, sites[node])
        if node in ends:
            walk.put_back_after(node, ends[node])
    tie_outputs(gm.graph)
    return edit.finish(gm)


@dataclass
class _Walk:
    """State of the walk.

    graph: the graph that is rewritten.
    plan: the plan.
    typing: types with the plan's sites.
    blocks: blocks by their attention.
    weighing: maps of attention that is spelled out, by their softmax, or by their product with values.
    args: each node's arguments before the walk, which the types refer to.
    states: the strategy's states of each stream, by level.
    places: each stream's places, where its tokens aren't in the grid's order.
    attention: each block's attention, by the block's number.
    scores: the scores of each block that has some, by the block's number.
    replacement: nodes that have been replaced, and by what.
    shares: the weights that recover each site's removed tokens, by stream and the level before the site.
    coerced: coerced values, by operand and what was done to it.
    stream_at_site: each stream as it entered a site, by stream and the level before the site.
    """

    graph: fx.Graph
    plan: Plan
    typing: SiteTyping
    blocks: dict[fx.Node, AttentionBlock]
    weighing: dict[fx.Node, AttentionMap]
    args: dict[fx.Node, Any]
    states: dict[Grid, list[StreamState]] = field(default_factory=dict)
    places: dict[Grid, fx.Node | None] = field(default_factory=dict)
    attention: dict[int, Attention] = field(default_factory=dict)
    scores: dict[int, fx.Node] = field(default_factory=dict)
    replacement: dict[fx.Node, fx.Node] = field(default_factory=dict)
    shares: dict[tuple[Grid, int], fx.Node] = field(default_factory=dict)
    coerced: dict[Any, fx.Node] = field(default_factory=dict)
    stream_at_site: dict[tuple[Grid, int], fx.Node] = field(default_factory=dict)

    def coerce(self, coercion: Coercion) -> None:
        """Give the coercion's node its operand in the type that it needs."""
        node, operand = coercion.node, coercion.operand
        emit = edit.Emitter(self.graph, like=node, before=node)
        given = value = self.current(operand)
        for dims in range(coercion.lead):
            value = self._once((operand, dims), emit, aten.unsqueeze.default, value, 0)
        # One operator per level and dimension; the key says what was done so far, so that equal work is shared. It
        # names the tokens: two streams of one size may read one table.
        for i, step in enumerate(coercion.steps):
            for level in _levels_between(step):
                grid = step.axis.domain.grid
                key = (operand, coercion.lead, coercion.steps[:i], step.dim, grid, level, coercion.updates)
                if coercion.updates and step.recovers:
                    value = self._updated(key, emit, value, coercion.images, step, level)
                else:
                    value = self._once(key, emit, *self._move(emit, value, coercion.images, step, level))
        if coercion.repeats > 1:
            value = self._repeated(emit, value, coercion)
        if any(step.recovers for step in coercion.steps):
            value.meta[RECOVERED] = True
        for again in coercion.rearranged:  # with the sizes that the original has
            given, whole = self.current(again), self.args[again][1:]
            value = self._once((again, operand, "whole"), emit, again.target, value, *whole)
        node.replace_input_with(given, value)
        if not is_higher_order(node.target):  # whose operands come whole again, so that its value is what it was
            node.meta.pop("val", None)

    def _repeated(self, emit: edit.Emitter, value: fx.Node, coercion: Coercion) -> fx.Node:
        """Return a value for each image as often as the reader has heads for it: [B, …] -> [B · H, …]."""
        place, heads = coercion.images, coercion.images + 1
        key = (value, "repeated", place, coercion.repeats)
        sizes = [coercion.repeats if dim == heads else -1 for dim in range(len(coercion.kind) + 1)]
        apart = self._once((key, "apart"), emit, aten.unsqueeze.default, value, heads)
        shown = self._once((key, "shown"), emit, aten.expand.default, apart, sizes)
        return self._once(key, emit, aten.flatten.using_ints, shown, place, heads)

    def _updated(self, key: Any, emit: edit.Emitter, value: fx.Node, images: int, step: Step, level: int) -> fx.Node:
        """Return a later stream brought back to `level`.

        That is the stream as it entered the site after that level, plus the recovered change since then.
        """
        grid, around = step.axis.domain.grid, (images, step.dim, step.axis.prefix, step.axis.suffix)
        before, removal = self.stream_at_site[grid, level], self.states[grid][level + 1].removal
        assert removal is not None
        kept_before = self._once((key, "then"), emit, gtp_fx.take_tokens.default, before, removal.kept, *around)
        change = self._once((key, "change"), emit, aten.sub.Tensor, value, kept_before)
        back = self._once((key, "back"), emit, *self._move(emit, change, images, step, level))
        return self._once(key, emit, aten.add.Tensor, back, before)

    def _once(self, key: Any, emit: edit.Emitter, target: Any, *args: Any) -> fx.Node:
        """Emit a call once per key: a rotary table is read by every block, and should be taken from once per level."""
        if key not in self.coerced:
            self.coerced[key] = emit(target, *args)
        return self.coerced[key]

    def _move(self, emit: edit.Emitter, value: fx.Node, images: int, step: Step, level: int) -> tuple[Any, ...]:
        """Return the operator and arguments that bring `value` to `level` along one dimension."""
        grid, around = step.axis.domain.grid, (images, step.dim, step.axis.prefix, step.axis.suffix)
        states = self.states[grid]
        if not step.recovers:
            removal = states[level].removal
            from_whole = step.axis.domain.level == 0
            index = states[level].index if from_whole else removal.kept  # type: ignore[union-attr]
            return (gtp_fx.take_tokens.default, value, index, *around)
        removal = states[level + 1].removal
        assert removal is not None
        if (grid, level) not in self.shares:
            places = () if self.places[grid] is None else (self.places[grid],)
            where = (removal.kept_index, removal.removed_index, home_of(grid).sides, *places)
            self.shares[grid, level] = emit(gtp_fx.recovery_weights.default, removal.weights, *where)
        return (
            gtp_fx.recover.default,
            value,
            self.shares[grid, level],
            removal.kept,
            removal.removed,
            *around,
        )

    def rewrite_attention(self, node: fx.Node) -> None:
        """Give attention the token scales of its keys, and let it score its tokens where its block has a site."""
        attention = Attention.of(node)
        keys = token_axis(self.wanted(node, 1)[-2])
        block = self.blocks.get(node)
        emit = edit.Emitter(self.graph, like=node, before=node)
        state = self.states[keys.domain.grid][keys.domain.level] if keys is not None and keys.domain.level else None
        # Scales enter as a bias on the keys' logits: log of the scale.
        bias = attention.bias
        strategy = self.plan.strategy
        if keys is not None and state is not None and strategy.reads_scales:
            bias = emit(gtp_fx.key_bias.default, state.scale, keys.prefix, keys.suffix, bias, attention.q)
        beside = keys_beside(self.wanted(node, 0), self.wanted(node, 1)) or (0, 0)
        operands = Attention(attention.q, attention.k, attention.v, bias, attention.scale, beside)
        if block is not None:
            self.attention[block.index] = operands
        scored = block is not None and block.index in self.plan.removed and strategy.score != "none"
        if block is not None and (scored or strategy.rewrites_every_attention):
            output, self.scores[block.index] = strategy.attend(emit, operands, block.axis, scored)
            output.meta[MARK], output.meta[ATTENDS] = node.meta[MARK], operands
            node.replace_all_uses_with(output)
            self.replacement[node] = output
            self.graph.erase_node(node)  # dead code elimination keeps attention, which may draw random numbers
        elif bias is not attention.bias:
            edit.set_args(node, (*node.args[:3], bias, *node.args[4:]))

    def tell_scales(self, node: fx.Node, attended: AttentionMap) -> None:
        """Let attention that is spelled out weigh a key by how many tokens it stands for.

        That adds log s to a softmax's logits, as in the operator. Weights without a softmax are multiplied by s.
        """
        keys = token_axis(self.wanted(node, 0)[-1])
        if keys is None or not keys.domain.level or not self.plan.strategy.reads_scales:
            return
        scale = self.states[keys.domain.grid][keys.domain.level].scale
        emit = edit.Emitter(self.graph, like=node, before=node)
        values, *rest = node.args
        if attended.softmax is not None:
            weighed = emit(gtp_fx.key_bias.default, scale, keys.prefix, keys.suffix, values, values)
        else:
            logs = emit(gtp_fx.key_bias.default, scale, keys.prefix, keys.suffix, None, values)
            weighed = emit(aten.mul.Tensor, values, emit(aten.exp.default, logs))
        edit.set_args(node, (weighed, *rest))

    def score_by_map(self, block: AttentionBlock) -> None:
        """Score the tokens of a block whose attention is spelled out, where it has a site."""
        if block.index not in self.plan.removed or block.map is None:
            return
        emit = edit.Emitter(self.graph, like=block.attention, before=block.attention)
        logits: Any = block.map.logits.args
        keys = emit(aten.transpose.int, logits[1], -2, -1)
        values: Any = block.attention.args[1]
        self.attention[block.index] = Attention(logits[0], keys, values, None, None)
        if self.plan.strategy.score != "none":
            around = (self.plan.strategy.score, block.axis.prefix, block.axis.suffix)
            self.scores[block.index] = emit(gtp_fx.scores_of_map.default, block.map.scored, *around)

    def rewrite_pooling(self, node: fx.Node) -> None:
        """Weight a mean over shortened tokens by their scales."""
        kind = self.wanted(node, 0)
        arguments: tuple[Any, ...] = node.args
        x, reduced, *keepdim = arguments
        dims = [dim % len(kind) for dim in reduced]
        axis = token_axis(kind[dims[0]]) if len(dims) == 1 else None
        if axis is None or not axis.domain.level:
            return
        images = images_dims(kind, self.typing.images[axis.domain.grid])[0]
        scale = self.states[axis.domain.grid][axis.domain.level].scale
        emit = edit.Emitter(self.graph, like=node, before=node)
        around = (images, dims[0], axis.prefix, axis.suffix, keepdim == [True])
        self.replacement[node] = emit(gtp_fx.weighted_mean.default, x, scale, *around)
        node.replace_all_uses_with(self.replacement[node])

    def wanted(self, node: fx.Node, position: int) -> TensorType:
        """Return the type in which `node` needs the operand that it had at `position` before the walk."""
        return self.typing.results[node].operands[self.args[node][position]]

    def current(self, node: Any) -> fx.Node:
        """Return the node's replacement, or the node itself."""
        found: fx.Node = self.replacement.get(node, node)
        return found

    def shorten_after(self, cut: fx.Node, block: AttentionBlock) -> None:
        """Insert the site of `block` after the node `cut`, and give its result to every later reader."""
        grid, place = block.axis.domain.grid, block.index
        if grid not in self.states:
            self.states[grid] = [self._start(grid)]
        emit = edit.Emitter(self.graph, like=cut, before=cut.next)
        state = self.states[grid][-1]
        count = self.plan.count(block.axis.domain.at(len(self.states[grid]) - 1))
        removed, attention = self.plan.removed[place], self.attention.get(place)
        site = AtSite(cut, block.axis, count, removed, place, self.scores.get(place), attention)
        shorter, new_state = self.plan.strategy.reduce(emit, site, state)
        shorter.meta[SITE] = (grid, new_state, self.places[grid])
        self.stream_at_site[grid, len(self.states[grid]) - 1] = cut
        self.states[grid].append(new_state)
        self._replace(cut, shorter, emit)

    def put_back_after(self, end: fx.Node, grid: Grid) -> None:
        """Put every token back in its place after the last block of a stream, where it has had a site."""
        if grid in self.states:
            end = self.current(end)  # where the last site is the block's end, behind it
            emit = edit.Emitter(self.graph, like=end, before=end.next)
            block = next(b for b in self.blocks.values() if b.axis.domain.grid == grid)
            whole = self.plan.strategy.put_back(emit, end, self.states[grid][-1], block.axis)
            self._replace(end, whole, emit)

    def _replace(self, old: fx.Node, new: fx.Node, emit: edit.Emitter) -> None:
        """Give `new` to all readers of `old` but the nodes that `emit` has inserted."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in emit.inserted)
        self.replacement[old] = new

    def _start(self, grid: Grid) -> StreamState:
        """Return the strategy's initial state of a stream, from what enters its first block, with a site or without."""
        streams = [
            block for block in self.blocks.values() if block.axis.domain.grid == grid and block.stream is not None
        ]
        first = streams[0]
        assert first.stream is not None
        emit = edit.Emitter(self.graph, like=first.stream, before=first.stream.next)
        places = self.places[grid] = places_of(emit, grid, first.stream, self._node_named)
        if places is not None:  # provenance reads it, whether the strategy does or not
            places.meta[edit.RECORDED] = True
        return self.plan.strategy.start(emit, first.stream, first.axis, self.places[grid])

    def _node_named(self, name: str) -> fx.Node:
        """Return a node that types name."""
        named: fx.Node = next(node for node in self.graph.nodes if node.name == name)
        return named


def _levels_between(step: Step) -> list[int]:
    """Return the levels to pass through, the last one included. From the whole grid, any level is one step away."""
    here = step.axis.domain.level
    if step.recovers:
        return list(range(here - 1, step.level - 1, -1))
    return [step.level] if here == 0 else list(range(here + 1, step.level + 1))
