"""Where a strategy's sites stand in a graph whose blocks are marked, and where its tokens are back, if they ever are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.analysis.blocks import AttentionBlock
from gtp_fx.analysis.typed_graph import TypedGraph
from gtp_fx.errors import OptionError
from gtp_fx.graph.nodes import descendants
from gtp_fx.strategies.protocol import Strategy
from gtp_fx.types.axes import Grid, is_plain
from gtp_fx.types.coercions import Coercion, find_coercions
from gtp_fx.types.infer import Edge, SiteTyping, levels


def cut_of(block: AttentionBlock, strategy: Strategy) -> fx.Node | None:
    """The node behind which tokens leave: the attention's residual add, or what enters the block."""
    return block.stream if strategy.before_attention else block.site


def leaving_blocks(blocks: Sequence[AttentionBlock], strategy: Strategy) -> list[AttentionBlock]:
    """The blocks at which the strategy lets tokens leave, of those at which they can."""
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
            f"strategy {strategy.name!r} lets tokens leave at blocks {', '.join(map(str, wrong))} of a stream that has {blocks}: "
            f"{type(strategy).__name__}.positions({blocks}) has to give numbers from 0 to {blocks - 1}"
        )
    return places


def ends_of(typed: TypedGraph, strategy: Strategy) -> dict[fx.Node, Grid]:
    """Behind which nodes every token is in its place again, and of which grid; none where tokens are gone for good."""
    if not strategy.restores_tokens:
        return {}
    typing = typed.whole
    last = {block.axis.domain.grid: block for block in typed.blocks if block.site is not None and block.refusal is None}
    ends = {_end_of_block(block.site): grid for grid, block in last.items() if block.site is not None}
    return {node: grid for node, grid in ends.items() if not all(map(is_plain, typing.type(node)))}


def updated_edges(typed: TypedGraph, strategy: Strategy, ends: Collection[fx.Node]) -> frozenset[Edge]:
    """Where the strategy recovers residual streams: (reader, stream); nowhere where it doesn't, or where that can't be done.

    ends: behind which tokens are back. Told with every site in place, whichever are used: a price and a rewrite then speak of the
    same graph.
    """
    if not strategy.recovers_updates:
        return frozenset()
    blocks, ends = typed.blocks, frozenset(ends)
    sites = frozenset(filter(None, (cut_of(block, strategy) for block in leaving_blocks(blocks, strategy))))
    edges = _edges_recovered(typed.with_sites(sites, ends), blocks)
    return frozenset() if find_coercions(typed.with_sites(sites, ends, edges)).refused else edges


def _edges_recovered(typing: SiteTyping, blocks: Sequence[AttentionBlock]) -> frozenset[Edge]:
    """Where residual streams are read on the way to what needs every token: (reader, stream).

    What is recovered there is a stream, so that a token that left can come back as what it was, changed as its neighbours
    were; behind a norm or a head that couldn't be told. Only what runs on tokens one by one may stand between, and nothing that
    goes back into the stream: a convolution in a block's MLP is left what it costs now.
    """
    streams = _streams(blocks)
    edges = set()
    for coercion in _recovering(typing):
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
    return [coercion for coercion in find_coercions(typing).found if any(step.recovers for step in coercion.steps)]


def _is_short(typing: SiteTyping, node: fx.Node) -> bool:
    return any(level for level in levels(typing.type(node)))


def _streams(blocks: Sequence[AttentionBlock]) -> dict[fx.Node, Grid]:
    """Every state of the blocks' residual streams behind the first attention, sums of it and of what was made from it; and of which
    grid."""
    found: dict[fx.Node, Grid] = {}
    for block in blocks:
        state = block.site
        while state is not None and state not in found:
            found[state] = block.axis.domain.grid
            state = _next_add(state)
    return found


def _end_of_block(site: fx.Node) -> fx.Node:
    """The last residual add that begins with `site`: of its MLP, and of what follows in the same way."""
    end = site
    while (behind := _next_add(end)) is not None:
        end = behind
    return end


def _next_add(stream: fx.Node) -> fx.Node | None:
    """The addition of `stream` and of something made from it."""
    made_of_it = descendants(stream)
    for user in stream.users:
        if user.target is aten.add.Tensor and len(user.all_input_nodes) == 2:
            others = [node for node in user.all_input_nodes if node is not stream]
            if others and others[0] in made_of_it:
                return user
    return None
