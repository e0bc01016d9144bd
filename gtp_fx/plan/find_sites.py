"""Finding candidates: every site at which tokens can be removed or can skip a branch, before any is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import fx

from gtp_fx.analysis.blocks import AttentionBlock
from gtp_fx.analysis.branches import Branch
from gtp_fx.analysis.liveness import ALL
from gtp_fx.analysis.placement import cut_of, ends_of, removing_blocks, updated_edges
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
    """The sites that a schedule can choose from.

    sites: all of them, in graph order.
    typing: types of the graph with every site in use where tokens can be removed.
    branches: the branch that tokens can skip, by block number.
    """

    sites: tuple[Site, ...]
    typing: SiteTyping
    branches: Mapping[int, Branch]


def find_sites(typed: TypedGraph, strategy: Strategy) -> Candidates:
    """Find every site at which `strategy` can remove tokens or let them skip a branch.

    Raises UnsupportedModelError, with the reasons, where there is none or where later operators need the removed
    tokens.
    """
    blocks = typed.blocks
    removing = removing_blocks(blocks, strategy)
    branched = [(block, block.branch) for block in blocks if block.branch is not None]
    _refuse_unfit(removing, [block for block, _ in branched], strategy)
    if not removing and not branched:
        number = "one block" if len(blocks) == 1 else f"{len(blocks)} blocks"
        raise UnsupportedModelError(
            f"this model has {number} of self-attention over patch tokens, and none can lose tokens "
            f"(flops_budget=1.0 still works):",
            (*(block.refusal for block in blocks if block.refusal is not None), *typed.unsupported_attention),
        )
    cuts = {block.index: cut for block in removing if (cut := cut_of(block, strategy)) is not None}
    ends = frozenset(ends_of(typed, strategy))
    # RuleResult with every site in use: an operator that can't do without the removed tokens shows up as an obstacle.
    typing = typed.with_sites(frozenset(cuts.values()), ends, updated_edges(typed, strategy, ends))
    if obstacles := _obstacles(typing, strategy):
        message = (
            "tokens can't be removed from this model: operators that need all of them, or those that remain, can't get "
            "them (flops_budget=1.0 still works)"
        )
        raise UnsupportedModelError(message, obstacles)
    # Blocks with a branch keep their grid whole, so they are typed without sites.
    sites = [_skip_site(block, branch, typed.whole, strategy, len(blocks)) for block, branch in branched]
    read = _grids_read(typed)
    sites += [
        replace(
            _removal_site(block, cuts[block.index], typing, len(blocks)), patches_read=block.axis.domain.grid in read
        )
        for block in removing
    ]
    in_order = tuple(sorted(sites, key=lambda site: site.block))
    return Candidates(in_order, typing, {block.index: branch for block, branch in branched})


def no_sites(typed: TypedGraph) -> Candidates:
    """Return an empty set of candidates, for a graph that is to keep its tokens; nothing is checked."""
    return Candidates((), typed.with_sites(frozenset()), {})


def _refuse_unfit(removing: list[AttentionBlock], skipping: list[AttentionBlock], strategy: Strategy) -> None:
    """Raise UnsupportedModelError where the strategy refuses the tokens of any candidate block."""
    candidates = [*((block, False) for block in removing), *((block, True) for block in skipping)]
    unfit = [
        Refusal(block.layer, strategy.name, reason)
        for block, skips in candidates
        if (reason := strategy.refuse(block.axis, skips))
    ]
    if unfit:
        raise UnsupportedModelError(f"strategy {strategy.name!r} can't work on this model", tuple(unfit))


def _skip_site(block: AttentionBlock, branch: Branch, typing: WholeTyping, strategy: Strategy, blocks: int) -> Site:
    """Make the site where tokens skip `branch`. blocks: number of attention blocks in the model."""
    heads = whole_size(typing.type(block.attention)[branch.heads])
    cost = branch_cost(branch, typing, heads, strategy)
    dtype = _dtype(branch.result)
    return Site(block.index, block.axis, cost.features, heads, 1, cost, dtype, block.index / blocks)


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
