"""Where tokens may leave, or skip a branch: every place that a schedule can use, before any is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import fx

from gtp_fx.analysis.blocks import AttentionBlock
from gtp_fx.analysis.branches import Branch
from gtp_fx.analysis.liveness import ALL
from gtp_fx.analysis.placement import cut_of, ends_of, leaving_blocks, updated_edges
from gtp_fx.analysis.typed_graph import TypedGraph
from gtp_fx.errors import Refusal, UnsupportedModelError
from gtp_fx.graph.nodes import layer_name, operator_name
from gtp_fx.graph.symbols import per_image, shape_of
from gtp_fx.options.schedule import BlockShape
from gtp_fx.plan.cost.closed_form import branch_cost
from gtp_fx.plan.site import Site
from gtp_fx.strategies import Strategy
from gtp_fx.types.axes import Grid, token_axis, whole_size
from gtp_fx.types.coercions import find_coercions
from gtp_fx.types.infer import SiteTyping, WholeTyping


@dataclass(frozen=True)
class Candidates:
    """sites: in graph order. typing: of the graph with a site wherever tokens may leave. branches: by block, where they may skip."""

    sites: tuple[Site, ...]
    typing: SiteTyping
    branches: Mapping[int, Branch]


def find_sites(typed: TypedGraph, strategy: Strategy) -> Candidates:
    """Raises UnsupportedModelError, with the reasons, where there can't be any."""
    blocks = typed.blocks
    leaving = leaving_blocks(blocks, strategy)
    branched = [(block, block.branch) for block in blocks if block.branch is not None]
    _refuse_unfit(leaving, [block for block, _ in branched], strategy)
    if not leaving and not branched:
        reasons = tuple(block.refusal for block in blocks if block.refusal is not None)
        raise UnsupportedModelError("no attention block of this model can lose tokens", reasons)
    cuts = {block.index: cut for block in leaving if (cut := cut_of(block, strategy)) is not None}
    ends = frozenset(ends_of(typed, strategy))
    typing = typed.with_sites(frozenset(cuts.values()), ends, updated_edges(typed, strategy, ends))
    if obstacles := _obstacles(typing, strategy):
        message = "tokens can't leave this model: what follows can't do without them (flops_budget=1.0 still works)"
        raise UnsupportedModelError(message, obstacles)
    sites = [_skipping(block, branch, typed.whole, strategy, len(blocks)) for block, branch in branched]
    read = _grids_read(typed)
    sites += [
        replace(_leaving(block, cuts[block.index], typing, len(blocks)), patches_read=block.axis.domain.grid in read)
        for block in leaving
    ]
    in_order = tuple(sorted(sites, key=lambda site: site.block))
    return Candidates(in_order, typing, {block.index: branch for block, branch in branched})


def no_sites(typed: TypedGraph) -> Candidates:
    """Where nothing is to leave, and whether anything could isn't asked."""
    return Candidates((), typed.with_sites(frozenset()), {})


def _refuse_unfit(leaving: list[AttentionBlock], skipping: list[AttentionBlock], strategy: Strategy) -> None:
    asked = [*((block, False) for block in leaving), *((block, True) for block in skipping)]
    unfit = [
        Refusal(block.layer, strategy.name, reason)
        for block, skips in asked
        if (reason := strategy.refuse(block.axis, skips))
    ]
    if unfit:
        raise UnsupportedModelError(f"strategy {strategy.name!r} can't work on this model", tuple(unfit))


def _skipping(block: AttentionBlock, branch: Branch, typing: WholeTyping, strategy: Strategy, blocks: int) -> Site:
    heads = whole_size(typing.type(block.attention)[branch.heads])
    cost = branch_cost(branch, typing, heads, strategy)
    dtype = _dtype(branch.result)
    return Site(block.index, block.axis, cost.features, heads, 1, cost, dtype, block.index / blocks)


def _obstacles(typing: SiteTyping, strategy: Strategy) -> tuple[Refusal, ...]:
    """What can't do without the tokens that left. Where those return, nobody has what they would have become meanwhile."""
    coercions = find_coercions(typing)
    if coercions.refused or not strategy.restores_tokens:
        return coercions.refused
    return tuple(
        Refusal(
            layer_name(coercion.node),
            operator_name(coercion.node),
            f"{coercion.reason}, of which {strategy.name!r} has a part only",
        )
        for coercion in coercions.found
        if any(step.recovers or step.axis.domain.level for step in coercion.steps)
    )


def _leaving(block: AttentionBlock, cut: fx.Node, typing: SiteTyping, blocks: int) -> Site:
    stream = typing.answers[cut].output
    assert isinstance(stream, tuple)
    axis = token_axis(stream[1])
    assert axis is not None
    return Site(
        block=block.index,
        axis=axis,
        channels=whole_size(stream[2]),
        heads=whole_size(typing.type(block.attention)[1]),
        images=per_image(whole_size(stream[0])),
        dtype=_dtype(cut),
        depth=block.index / blocks,
        key_features=whole_size(typing.type(block.attention.args[1])[-1]),  # type: ignore[arg-type]
    )


def _grids_read(typed: TypedGraph) -> set[Grid]:
    """The grids whose patches something reads behind the last block that attends over them."""
    needed = typed.live().needed
    last = {block.axis.domain.grid: block for block in typed.blocks}
    return {
        grid
        for grid, block in last.items()
        if not block.dead and (block.site is None or needed.get(block.site, ALL) == ALL)
    }


def _dtype(node: fx.Node) -> str:
    return str(node.meta["val"].dtype).removeprefix("torch.")


def block_shape(block: AttentionBlock) -> BlockShape:
    """What a schedule recognises the block by: nothing that depends on the batch or on the door that it came through."""
    channels = shape_of(block.site)[-1] if block.site is not None else 0
    return BlockShape(block.axis.domain.whole_count, channels, shape_of(block.attention.args[0])[-1])  # type: ignore[arg-type]
