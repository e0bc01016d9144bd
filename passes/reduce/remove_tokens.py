"""Approximate: remove tokens. The strategy's operators are inserted at sites, and later nodes are repaired from types.

The graph is typed with the plan's sites, then walked once in order. At each node:
  1. An operand at another level than the node needs is coerced (`insert_coercions`): of older values the remaining
     tokens are taken, and in newer ones the removed tokens are recovered.
  2. Arguments that are sizes are recomputed from the types and the plan's token counts.
  3. Attention over shortened keys gets their token scales, and scores its tokens where its block has a site
     (`rewrite_attention`).
  4. After a site, every later reader gets the shortened stream instead of the whole one.
Outputs that later layers read are tied to what those read (`tie_outputs`), for gradients.

The level of a stream is the number of its sites so far; at level 0 it has all tokens.
"""

from __future__ import annotations

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.analysis.blocks import AttentionBlock
from gtp_fx.analysis.placement import cut_of, ends_of, updated_edges
from gtp_fx.analysis.returned_tokens import returned_tokens
from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.errors import UnsupportedModelError
from gtp_fx.graph import edit
from gtp_fx.graph.operators import ATTENTION
from gtp_fx.passes.reduce.insert_coercions import coerce
from gtp_fx.passes.reduce.map_tokens import map_tokens
from gtp_fx.passes.reduce.rewrite_attention import rewrite_attention, rewrite_pooling, score_by_map, tell_scales
from gtp_fx.passes.reduce.tie_outputs import tie_outputs
from gtp_fx.passes.reduce.walk import Walk
from gtp_fx.plan.plan import Plan
from gtp_fx.strategies.sites import AtSite, StreamState
from gtp_fx.types.coercions import find_coercions
from gtp_fx.types.grids import Grid
from gtp_fx.types.infer import infer_with_sites
from gtp_fx.types.places import places_of

SITE = "gtp_site"
"""Meta key of a node after which tokens have been removed: the grid they were on, the state of what remains, and the
node of all patches' places (`gtp_fx.types.places`), None where they are in order."""

RETURNED = "gtp_returned"
"""Meta key of the output node of a rewritten graph: the outputs that run over tokens, each with those that are left."""


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
    cuts = frozenset(filter(None, sites))
    typing = infer_with_sites(gm.graph, cuts, frozenset(ends), edges)
    found = find_coercions(typing)
    maps = {}
    if plan.strategy.recovers_by_attention and found.levels_recovered:
        maps = map_tokens(gm, sites.values(), found.levels_recovered)
        typing = infer_with_sites(gm.graph, cuts, frozenset(ends), edges)
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
    spelled = [block.map for block in blocks if block.map is not None]
    weighing = {attended.product if attended.softmax is None else attended.softmax: attended for attended in spelled}
    walk = Walk(gm.graph, plan, typing, {block.attention: block for block in blocks}, weighing, args, maps=maps)
    # The nodes as they are now: the walk inserts others, which need no repair.
    for node in list(gm.graph.nodes):
        answer = typing.results.get(node)
        if answer is None:
            continue
        for coercion in coercions.get(node, ()):
            coerce(walk, coercion)
        if answer.repair is not None:
            edit.set_args(node, answer.repair(plan.count))
        if node.target in ATTENTION:
            rewrite_attention(walk, node)
        elif node in walk.weighing:
            tell_scales(walk, node, walk.weighing[node])
        if node.target not in ATTENTION and node in walk.blocks:
            score_by_map(walk, walk.blocks[node])
        if node.target is aten.mean.dim and plan.strategy.weighted_pooling:
            rewrite_pooling(walk, node)
        if node in sites:
            _shorten_after(walk, node, sites[node])
        if node in ends:
            _put_back_after(walk, node, ends[node])
    tie_outputs(gm.graph)
    return edit.finish(gm)


def _shorten_after(walk: Walk, cut: fx.Node, block: AttentionBlock) -> None:
    """Insert the site of `block` after the node `cut`, and give its result to every later reader."""
    grid, place = block.axis.domain.grid, block.index
    if grid not in walk.states:
        walk.states[grid] = [_start(walk, grid)]
    emit = edit.Emitter(walk.graph, like=cut, before=cut.next)
    state = walk.states[grid][-1]
    count = walk.plan.count(block.axis.domain.at(len(walk.states[grid]) - 1))
    removed, attention = walk.plan.removed[place], walk.attention.get(place)
    site = AtSite(cut, block.axis, count, removed, place, walk.scores.get(place), attention)
    shorter, new_state = walk.plan.strategy.reduce(emit, site, state)
    shorter.meta[SITE] = (grid, new_state, walk.places[grid])
    walk.stream_at_site[grid, len(walk.states[grid]) - 1] = cut
    walk.states[grid].append(new_state)
    walk.replace(cut, shorter, emit)


def _put_back_after(walk: Walk, end: fx.Node, grid: Grid) -> None:
    """Put every token back in its place after the last block of a stream, where it has had a site."""
    if grid in walk.states:
        end = walk.current(end)  # where the last site is the block's end, behind it
        emit = edit.Emitter(walk.graph, like=end, before=end.next)
        block = next(b for b in walk.blocks.values() if b.axis.domain.grid == grid)
        whole = walk.plan.strategy.put_back(emit, end, walk.states[grid][-1], block.axis)
        walk.replace(end, whole, emit)


def _start(walk: Walk, grid: Grid) -> StreamState:
    """Return the strategy's initial state of a stream, from what enters its first block, with a site or without."""
    streams = [block for block in walk.blocks.values() if block.axis.domain.grid == grid and block.stream is not None]
    first = streams[0]
    assert first.stream is not None
    emit = edit.Emitter(walk.graph, like=first.stream, before=first.stream.next)
    places = walk.places[grid] = places_of(emit, grid, first.stream, walk.node_named)
    if places is not None:  # provenance reads it, whether the strategy does or not
        places.meta[edit.RECORDED] = True
    return walk.plan.strategy.start(emit, first.stream, first.axis, walk.places[grid])
