"""Attention blocks of a marked graph: where each is, and whether tokens can be removed there or why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import fx

from gtp_fx.analysis.attention_maps import AttentionMap, find_map
from gtp_fx.analysis.branch_parts import NoBranch
from gtp_fx.analysis.branches import Branch, find_branch
from gtp_fx.analysis.marks import MARK, marks_of
from gtp_fx.analysis.refused_blocks import keeps_pictures_apart, why_not
from gtp_fx.analysis.residual_adds import stream_of
from gtp_fx.analysis.token_states import state_before
from gtp_fx.errors import Refusal
from gtp_fx.graph.nodes import layer_name, refusal
from gtp_fx.graph.operators import ATTENTION
from gtp_fx.types.axes import TokenAxis, is_plain, token_axes, token_axis
from gtp_fx.types.grids import Grid
from gtp_fx.types.infer import SiteTyping, WholeTyping
from gtp_fx.types.layouts import base_of
from gtp_fx.types.places import is_window


@dataclass(frozen=True)
class AttentionBlock:
    """One attention block of a graph.

    index: its number in graph order, from 0.
    layer: module path of its attention.
    attention: the attention node; where it is spelled out, the product of its map and values.
    site: the residual add after the attention, or the first state of the tokens (`gtp_fx.analysis.token_states`);
        None where there is neither.
    stream: the block's input, which is the other operand of that add, or the state before.
    axis: the tokens it attends over, with all of them in place.
    refusal: why tokens can't be removed at this block; None where they can.
    dead: no patch token is alive after the block, so what a schedule would remove there is dead already.
    branch: where tokens can't be removed, the part of the block that they can skip; None where there is none.
    map: the attention's map, where it is spelled out.
    """

    index: int
    layer: str
    attention: fx.Node
    site: fx.Node | None
    stream: fx.Node | None
    axis: TokenAxis
    refusal: Refusal | None = None
    dead: bool = False
    branch: Branch | None = None
    map: AttentionMap | None = None

    def copied(self, at: Mapping[fx.Node, fx.Node]) -> AttentionBlock:
        """Return this block in a copy of the graph. at: each node's copy."""
        return replace(
            self,
            attention=at[self.attention],
            site=None if self.site is None else at[self.site],
            stream=None if self.stream is None else at[self.stream],
            branch=None if self.branch is None else self.branch.copied(at),
            map=None if self.map is None else self.map.copied(at),
        )


SitesTyped = Callable[[frozenset[fx.Node]], SiteTyping]
"""Return the types of a graph with sites after some of its nodes."""


def read_blocks(typing: WholeTyping, with_sites: SitesTyped) -> tuple[AttentionBlock, ...]:
    """Read the marked blocks of a graph, in order, and decide for each whether tokens can be removed there.

    typing: types with every token in place. with_sites: types the same graph with sites.
    """
    marked = {(mark.role, mark.index): node for node, mark in marks_of(typing.graph)}
    # Grids that some blocks attend over in windows: they stay whole, for the blocks that attend over all of them too.
    windowed = {
        base_of(axis.domain.grid) for node in marked.values() if is_window((axis := node.meta[MARK].axis).domain.grid)
    }
    blocks = []
    for (role, index), attention in marked.items():
        if role == "attention":
            site = marked.get(("site", index))
            axis = attention.meta[MARK].axis
            stream = None if site is None else stream_of(site, attention, typing)
            if stream is None and site is not None:
                stream = state_before(attention, site, axis, typing)
            why = why_not(attention, site, typing)
            if stream is None and why is None:
                why = refusal(attention, "no one value is all that is left of its tokens before this attention")
            if why is None and base_of(axis.domain.grid) in windowed:
                why = refusal(
                    attention, "other blocks attend within windows of these tokens, so their grid has to stay whole"
                )
            dead = site is not None and all(map(is_plain, typing.type(site)))
            layer = layer_name(attention)
            spelled = None if attention.target in ATTENTION else find_map(attention, typing)
            blocks.append(AttentionBlock(index, layer, attention, site, stream, axis, why, dead, map=spelled))
    # Removing tokens pays only while they stay removed: drop the grids that something between blocks needs whole.
    returned = _made_whole_again(blocks, with_sites)
    reason = "something between blocks needs the whole grid, so removed tokens would have to be recovered each time"
    blocks = [replace(b, refusal=refusal(b.attention, reason)) if b.axis.domain.grid in returned else b for b in blocks]
    # Where nothing is removed from a grid, its blocks may still let tokens skip a branch.
    shortened = {base_of(block.axis.domain.grid) for block in blocks if block.refusal is None}
    return _each_part_once(b if base_of(b.axis.domain.grid) in shortened else _with_branch(b, typing) for b in blocks)


def _made_whole_again(blocks: list[AttentionBlock], with_sites: SitesTyped) -> set[Grid]:
    """Return the grids that are whole again at some site, or at the attention before it, after tokens were removed."""
    sites = [block.site for block in blocks if block.refusal is None and block.site is not None]
    typing = with_sites(frozenset(sites))
    domains = Counter(
        axis.domain
        for site in sites
        for axis in token_axes(typing.results[site].output)  # type: ignore[arg-type]
    )
    returned = {domain.grid for domain, count in domains.items() if count > 1}
    for block in blocks:
        if block.site in sites:
            query = token_axis(typing.type(block.attention.args[0])[-2])  # type: ignore[arg-type]
            removed_from = token_axis(typing.results[block.site].output[1])  # type: ignore[index, arg-type]
            if query != removed_from:
                returned.add(block.axis.domain.grid)
    return returned


def _with_branch(block: AttentionBlock, typing: WholeTyping) -> AttentionBlock:
    """Return a refused block with the branch that its tokens can skip.

    Where there is none, the reason for that is added to its refusal. Other blocks are returned as they are.
    """
    if block.refusal is None or block.site is None or block.dead or keeps_pictures_apart(block.attention):
        return block
    try:
        if block.attention.target not in ATTENTION:
            raise NoBranch("its attention is spelled out, and does more than softmax(q·kᵀ)·v")
        return replace(block, branch=find_branch(block.attention, block.site, typing))
    except NoBranch as reason:
        both = f"{block.refusal.reason}; nor can they skip a branch of the block: {reason}"
        return replace(block, refusal=replace(block.refusal, reason=both))


def _each_part_once(blocks: Iterable[AttentionBlock]) -> tuple[AttentionBlock, ...]:
    """Return the blocks without the branches that follow an earlier block's attention as well."""
    taken: set[fx.Node] = set()
    found = []
    for block in blocks:
        inside = set() if block.branch is None else set(block.branch.inside)
        if inside & taken and block.refusal is not None:
            reason = f"{block.refusal.reason}; what its tokens could skip is another block's, whose scores decide"
            block = replace(block, branch=None, refusal=replace(block.refusal, reason=reason))
        taken |= inside
        found.append(block)
    return tuple(found)
