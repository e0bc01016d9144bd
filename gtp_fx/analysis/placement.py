"""Placement of a strategy's sites in a graph with marked blocks, and of the nodes where its tokens are back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.analysis.blocks import AttentionBlock
from gtp_fx.analysis.resting import Rest
from gtp_fx.analysis.typed_graph import TypedGraph
from gtp_fx.analysis.window_forms import NoRest
from gtp_fx.errors import OptionError, Refusal
from gtp_fx.graph.nodes import descendants, refusal
from gtp_fx.strategies.protocol import Strategy
from gtp_fx.types.axes import is_plain
from gtp_fx.types.coercions import Coercion, find_coercions
from gtp_fx.types.grids import Grid
from gtp_fx.types.infer import Edge, SiteTyping, levels


def cut_of(block: AttentionBlock, strategy: Strategy) -> fx.Node | None:
    """Return the node after which tokens are removed: the attention's residual add, or the block's input."""
    return block.stream if strategy.before_attention else block.site


def removing_blocks(blocks: Sequence[AttentionBlock], strategy: Strategy) -> list[AttentionBlock]:
    """Return the blocks at which the strategy removes tokens, among those at which that is possible.

    Raises OptionError where the strategy names a block that its stream doesn't have.
    """
    return [block for block in placed_blocks(blocks, strategy) if not why_unfit(block, strategy)]


def why_unfit(block: AttentionBlock, strategy: Strategy) -> str:
    """Return why the strategy can't work on a block's tokens, or on those that may skip its branch; empty where it can.

    Other blocks don't depend on it.
    """
    if block.map is not None and strategy.rewrites_every_attention:
        return "its attention is spelled out, and entries of its map can't be dropped (attention_sparsity below 1)"
    reason = strategy.refuse(block.axis, block.branch is not None)
    cut = cut_of(block, strategy)
    return reason if reason or block.branch is not None or cut is None else strategy.refuse_stream(cut, block.axis)


def resting_blocks(
    typed: TypedGraph, branched: Sequence[AttentionBlock], strategy: Strategy
) -> tuple[dict[int, Rest], dict[int, Refusal]]:
    """Return the blocks with a branch whose windows can rest, where the strategy lets them, and why others' can't."""
    rests: dict[int, Rest] = {}
    restless: dict[int, Refusal] = {}
    instead = "so their tokens skip the branch"
    if not strategy.skips_branches:
        instead = f"and strategy {strategy.name!r} lets no tokens skip the branch"
    every = typed.rests if branched and strategy.rests_windows else {}
    for block in branched if every else ():
        found = every[block.index]
        why = found.patch_keys if isinstance(found, Rest) and strategy.rest_keys == "patches" else found
        if isinstance(why, NoRest):
            restless[block.index] = refusal(block.attention, f"its windows can't rest, {instead}: {why}")
        else:
            assert isinstance(found, Rest)
            rests[block.index] = found
    return rests, restless


def placed_blocks(blocks: Sequence[AttentionBlock], strategy: Strategy) -> list[AttentionBlock]:
    """Return the blocks that can lose tokens, at the positions that the strategy takes, whether or not it fits them.

    Raises OptionError where the strategy names a block that its stream doesn't have.
    """
    by_stream: dict[Grid, list[AttentionBlock]] = defaultdict(list)
    for block in blocks:
        by_stream[block.axis.domain.grid].append(block)
    chosen = {
        of_stream[place].index for of_stream in by_stream.values() for place in _positions(strategy, len(of_stream))
    }
    return [b for b in blocks if b.index in chosen and b.refusal is None and cut_of(b, strategy) is not None]


def _positions(strategy: Strategy, blocks: int) -> set[int]:
    places = set(strategy.positions(blocks))
    wrong = sorted(places - set(range(blocks)))
    if wrong:
        raise OptionError(
            f"strategy {strategy.name!r} removes tokens at blocks {', '.join(map(str, wrong))} "
            f"of a stream that has {blocks}: "
            f"{type(strategy).__name__}.positions({blocks}) has to give numbers from 0 to {blocks - 1}"
        )
    return places


def ends_of(typed: TypedGraph, strategy: Strategy) -> dict[fx.Node, Grid]:
    """Return the nodes after which every token of a grid is in place again, each with its grid.

    Empty for a strategy that removes tokens for good.
    """
    if not strategy.restores_tokens:
        return {}
    typing = typed.whole
    last = {block.axis.domain.grid: block for block in typed.blocks if block.site is not None and block.refusal is None}
    ends = {_end_of_block(block.site): grid for grid, block in last.items() if block.site is not None}
    return {node: grid for node, grid in ends.items() if not all(map(is_plain, typing.type(node)))}


def updated_edges(typed: TypedGraph, strategy: Strategy, ends: Collection[fx.Node]) -> frozenset[Edge]:
    """Return the edges (reader, stream) at which the strategy recovers tokens in their residual stream.

    ends: the nodes after which tokens are back. The edges are found with every possible site in use, whichever a plan
    then uses, so that prices and rewrites refer to the same graph. Empty where the strategy doesn't recover streams, or
    where some node then couldn't get the tokens it needs.
    """
    if not strategy.recovers_updates:
        return frozenset()
    blocks, ends = typed.blocks, frozenset(ends)
    sites = frozenset(filter(None, (cut_of(block, strategy) for block in removing_blocks(blocks, strategy))))
    # Type the graph a second time with these edges: a refusal there means that they can't be used.
    edges = _edges_recovered(typed.with_sites(sites, ends), blocks)
    return frozenset() if find_coercions(typed.with_sites(sites, ends, edges)).refused else edges


def _edges_recovered(typing: SiteTyping, blocks: Sequence[AttentionBlock]) -> frozenset[Edge]:
    """Return the edges (reader, stream) where a residual stream is read on the way to a node that needs every token.

    Recovery at such an edge acts on a stream, so a removed token can come back as what it was plus what changed in its
    neighbours. After a norm or a head that sum would make no sense. Between the edge and the node that needs every
    token only token-wise operators may stand, and nothing may go back into the stream: a convolution inside a block's
    MLP keeps its present price.
    """
    streams = _streams(blocks)
    edges = set()
    for coercion in _recovering(typing):
        # Walk up from the value that needs recovery to the stream; give up where two shortened values meet on the way.
        reader, read = coercion.node, coercion.operand
        while read not in streams:
            shortened = [node for node in read.all_input_nodes if typing.is_tensor(node) and _is_short(typing, node)]
            if len(shortened) != 1:
                break
            reader, read = read, shortened[0]
        else:
            grid = streams[read]
            if not any(streams.get(node) == grid for node in (reader, *descendants(reader))):
                edges.add((reader, read))
    return frozenset(edges)


def _recovering(typing: SiteTyping) -> list[Coercion]:
    """Return the coercions that recover removed tokens."""
    return [coercion for coercion in find_coercions(typing).found if any(step.recovers for step in coercion.steps)]


def _is_short(typing: SiteTyping, node: fx.Node) -> bool:
    """Return whether tokens are missing from a value."""
    return any(level for level in levels(typing.type(node)))


def _streams(blocks: Sequence[AttentionBlock]) -> dict[fx.Node, Grid]:
    """Return every state of the blocks' residual streams after the first attention, each with its grid.

    A state is a residual add: the state before it plus something computed from that.
    """
    found: dict[fx.Node, Grid] = {}
    for block in blocks:
        state = block.site
        while state is not None and state not in found:
            found[state] = block.axis.domain.grid
            state = _next_add(state)
    return found


def _end_of_block(site: fx.Node) -> fx.Node:
    """Return the last residual add of the chain that starts at `site`: its MLP's, and any that follow."""
    end = site
    while (following := _next_add(end)) is not None:
        end = following
    return end


def _next_add(stream: fx.Node) -> fx.Node | None:
    """Return the addition of `stream` and something computed from it, or None."""
    made_of_it = descendants(stream)
    for user in stream.users:
        if user.target is aten.add.Tensor and len(user.all_input_nodes) == 2:
            others = [node for node in user.all_input_nodes if node is not stream]
            if others and others[0] in made_of_it:
                return user
    return None
