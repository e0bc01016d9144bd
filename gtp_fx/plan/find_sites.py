"""Finding candidates: every site at which tokens can be removed or can skip a branch, before any is chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from gtp_fx.analysis.blocks import AttentionBlock
from gtp_fx.analysis.branches import Branch
from gtp_fx.analysis.liveness import ALL
from gtp_fx.analysis.placement import (
    cut_of,
    ends_of,
    placed_blocks,
    removing_blocks,
    resting_blocks,
    updated_edges,
    why_unfit,
)
from gtp_fx.analysis.resting import Rest
from gtp_fx.analysis.typed_graph import TypedGraph
from gtp_fx.errors import Refusal, UnsupportedModelError
from gtp_fx.graph.nodes import layer_name, operator_name
from gtp_fx.graph.symbols import shape_of
from gtp_fx.options.schedule import BlockShape
from gtp_fx.plan.cost.closed_form import branch_cost, rest_cost
from gtp_fx.plan.site import Site
from gtp_fx.strategies import Strategy
from gtp_fx.types.axes import token_axis, whole_size
from gtp_fx.types.coercions import find_coercions
from gtp_fx.types.grids import Grid
from gtp_fx.types.infer import SiteTyping, WholeTyping


@dataclass(frozen=True)
class Candidates:
    """The sites that a schedule can choose from.

    sites: all of them, in graph order.
    typing: types of the graph with every site in use where tokens can be removed.
    branches: the branch that tokens can skip, by block number.
    placed: the blocks at which the strategy would remove tokens or let them skip a branch, if it could.
    left_out: why it can't, for some of these, by block number.
    rests: the blocks whose windows can rest, where the strategy lets them, by number.
    restless: why the windows of other blocks can't, so that tokens skip the branch there; with a strategy of which none
        do, these blocks are left out.
    """

    sites: tuple[Site, ...]
    typing: SiteTyping
    branches: Mapping[int, Branch]
    placed: tuple[AttentionBlock, ...] = ()
    left_out: Mapping[int, Refusal] = field(default_factory=dict)
    rests: Mapping[int, Rest] = field(default_factory=dict)
    restless: Mapping[int, Refusal] = field(default_factory=dict)


def find_sites(typed: TypedGraph, strategy: Strategy) -> Candidates:
    """Find every site at which `strategy` can remove tokens or let them skip a branch.

    Blocks whose tokens it can't work on are left out, and so are streams whose removed tokens later operators need.
    Raises UnsupportedModelError, with the reasons, where no block is left.
    """
    blocks = typed.blocks
    branched = [(block, block.branch) for block in blocks if block.branch is not None]
    placed = [*placed_blocks(blocks, strategy), *(block for block, _ in branched)]
    left_out = {b.index: Refusal(b.layer, strategy.name, why) for b in placed if (why := why_unfit(b, strategy))}
    branched = [(block, branch) for block, branch in branched if block.index not in left_out]
    rests, restless = resting_blocks(typed, [block for block, _ in branched], strategy)
    if not strategy.skips_branches:
        left_out |= restless
        branched = [(block, branch) for block, branch in branched if block.index in rests]
        restless = {}
    removing = removing_blocks(blocks, strategy)
    if not removing and not branched:
        if left_out:
            refusals = tuple(left_out[index] for index in sorted(left_out))
            raise UnsupportedModelError(f"strategy {strategy.name!r} can't work on this model", refusals)
        number = "one block" if len(blocks) == 1 else f"{len(blocks)} blocks"
        raise UnsupportedModelError(
            f"this model has {number} of self-attention over patch tokens, and none can lose tokens "
            f"(flops_budget=1.0 still works):",
            (*(block.refusal for block in blocks if block.refusal is not None), *typed.unsupported_attention),
        )
    typing, needed = _typed_with_sites(typed, removing, strategy, bool(branched))
    left_out |= needed
    removing = [block for block in removing if block.index not in needed]
    cuts = _cuts(removing, strategy)
    # Blocks with a branch keep their grid whole, so they are typed without sites.
    whole = typed.whole
    sites = [
        _rest_site(block, rests[block.index], whole, strategy, len(blocks))
        if block.index in rests
        else _skip_site(block, branch, whole, strategy, len(blocks), bool(rests))
        for block, branch in branched
    ]
    read = _grids_read(typed)
    sites += [
        replace(
            _removal_site(block, cuts[block.index], typing, len(blocks)), patches_read=block.axis.domain.grid in read
        )
        for block in removing
    ]
    in_order = tuple(sorted(sites, key=lambda site: site.block))
    return Candidates(
        in_order,
        typing,
        {block.index: branch for block, branch in branched},
        tuple(placed),
        dict(sorted(left_out.items())),
        rests,
        restless,
    )


def no_sites(typed: TypedGraph) -> Candidates:
    """Return an empty set of candidates, for a graph that is to keep its tokens; nothing is checked."""
    return Candidates((), typed.with_sites(frozenset()), {})


def _typed_with_sites(
    typed: TypedGraph, removing: Sequence[AttentionBlock], strategy: Strategy, may_be_none: bool
) -> tuple[SiteTyping, dict[int, Refusal]]:
    """Type the graph with a site at each of `removing` that nothing speaks against.

    Returns the types, and for the other blocks an operator that can't do without their tokens, by block number.
    Raises UnsupportedModelError where no block is left, unless `may_be_none`.
    """
    ends = frozenset(ends_of(typed, strategy))
    edges = updated_edges(typed, strategy, ends)

    def with_sites(blocks: Sequence[AttentionBlock]) -> SiteTyping:
        return typed.with_sites(frozenset(_cuts(blocks, strategy).values()), ends, edges)

    # With every site in use, an operator that can't do without the removed tokens shows up as an obstacle.
    typing = with_sites(removing)
    every = _obstacles(typing, strategy)
    if not every:
        return typing, {}
    # Take the streams one by one, in graph order, and leave out those with an obstacle beside the ones before them.
    taken: list[AttentionBlock] = []
    needed: dict[int, Refusal] = {}
    for grid in dict.fromkeys(block.axis.domain.grid for block in removing):
        stream = [block for block in removing if block.axis.domain.grid == grid]
        if obstacles := _obstacles(with_sites([*taken, *stream]), strategy):
            needed |= {block.index: obstacles[0] for block in stream}
        else:
            taken += stream
    if not taken and not may_be_none:
        message = (
            "tokens can't be removed from this model: operators that need all of them, or those that remain, can't get "
            "them (flops_budget=1.0 still works)"
        )
        raise UnsupportedModelError(message, every)
    return with_sites(taken), needed


def _cuts(blocks: Sequence[AttentionBlock], strategy: Strategy) -> dict[int, fx.Node]:
    """Return the node after which tokens are removed, by block number."""
    return {block.index: cut for block in blocks if (cut := cut_of(block, strategy)) is not None}


def _skip_site(
    block: AttentionBlock, branch: Branch, typing: WholeTyping, strategy: Strategy, blocks: int, beside_rests: bool
) -> Site:
    """Make the site where tokens skip `branch`.

    blocks: number of attention blocks in the model. beside_rests: whether windows may rest in others.
    """
    query = typing.type(block.attention)
    heads = math.prod(whole_size(query[dim]) for dim in branch.heads)
    cost = branch_cost(branch, typing, heads, strategy, beside_rests)
    dtype = _dtype(branch.parts[0].result)
    return Site(block.index, block.axis, cost.features, heads, 1, cost, dtype, block.index / blocks)


def _rest_site(block: AttentionBlock, rest: Rest, typing: WholeTyping, strategy: Strategy, blocks: int) -> Site:
    """Make the site where windows rest. blocks: number of attention blocks in the model."""
    cost = rest_cost(rest, typing, strategy)
    dtype = _dtype(rest.result)
    return Site(block.index, block.axis, cost.features, 1, 1, cost, dtype, block.index / blocks)


def _obstacles(typing: SiteTyping, strategy: Strategy) -> tuple[Refusal, ...]:
    """Return the operators that need removed tokens and can't get them back.

    A strategy that restores tokens keeps them as they were when they were removed. Recovering them in between would
    need their later values, which were never computed.
    """
    coercions = find_coercions(typing)
    if coercions.refused or not strategy.restores_tokens:
        return coercions.refused
    return tuple(
        Refusal(
            layer_name(coercion.node),
            operator_name(coercion.node),
            f"{coercion.reason}, of which strategy {strategy.name!r} has only a part",
        )
        for coercion in coercions.found
        if any(step.recovers or step.axis.domain.level for step in coercion.steps)
    )


def _removal_site(block: AttentionBlock, cut: fx.Node, typing: SiteTyping, blocks: int) -> Site:
    """Make the site where tokens are removed after the node `cut`. blocks: number of attention blocks in the model."""
    stream = typing.results[cut].output
    assert isinstance(stream, tuple)
    axis = token_axis(stream[1])
    assert axis is not None
    return Site(
        block=block.index,
        axis=axis,
        channels=whole_size(stream[2]),
        heads=whole_size(typing.type(block.attention)[1]),
        images=whole_size(stream[0]),
        dtype=_dtype(cut),
        depth=block.index / blocks,
        key_features=whole_size(typing.type(block.attention.args[1])[-1]),  # type: ignore[arg-type]
    )


def _grids_read(typed: TypedGraph) -> set[Grid]:
    """Return the grids whose patches are read by something after the last block that attends over them."""
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
    """Return the shape by which a schedule recognises a block.

    It depends neither on the batch nor on how the graph was captured.
    """
    channels = shape_of(block.site)[-1] if block.site is not None else 0
    return BlockShape(block.axis.domain.whole_count, channels, shape_of(block.attention.args[0])[-1])  # type: ignore[arg-type]
