"""Attention blocks of a marked graph: where each is, and whether tokens can be removed there or why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import fx, nn
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.analysis.attention_maps import AttentionMap, find_map
from gtp_fx.analysis.branch_parts import NoBranch
from gtp_fx.analysis.branches import Branch, find_branch, keys_beside, pooled_to
from gtp_fx.analysis.token_states import state_before
from gtp_fx.errors import Refusal
from gtp_fx.graph.nodes import (
    ancestors,
    attention_dropout,
    descendants,
    is_input,
    layer_name,
    operator_name,
    refusal,
    source_line,
    tensors_of,
)
from gtp_fx.graph.operators import (
    ATTENTION,
    CASTS,
    CASTS_LIKE,
    DROPOUTS,
    PERMUTATIONS,
    RESIDUAL_SUMS,
    SCALINGS,
    SOFTMAXES,
    VIEWS,
)
from gtp_fx.graph.symbols import shape_of
from gtp_fx.strategies.protocol import Attention
from gtp_fx.types.axes import Grid, TokenAxis, is_plain, token_axes, token_axis
from gtp_fx.types.infer import SiteTyping, WholeTyping
from gtp_fx.types.layouts import base_of
from gtp_fx.types.places import is_window

MARK = "gtp_block"
_SHARES = (*SCALINGS, *CASTS, *CASTS_LIKE, *DROPOUTS, *PERMUTATIONS, *VIEWS, aten.neg.default)
"""Operators that give a fixed multiple of their first operand, however turned, where the others aren't tokens."""


@dataclass(frozen=True)
class Mark:
    """The mark that `mark_blocks` puts on a node.

    index: number of the attention block.
    role: what the node is in it, "attention" or "site".
    axis: the tokens that the block attends over, with all of them in place.
    """

    index: int
    role: str
    axis: TokenAxis


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


def marks_of(graph: fx.Graph) -> tuple[tuple[fx.Node, Mark], ...]:
    """Return every marked node with its mark, in graph order."""
    return tuple((node, node.meta[MARK]) for node in graph.nodes if MARK in node.meta)


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
            refusal = _why_not(attention, site, typing)
            if stream is None and refusal is None:
                refusal = _refusal(attention, "no one value is all that is left of its tokens before this attention")
            if refusal is None and base_of(axis.domain.grid) in windowed:
                refusal = _refusal(
                    attention, "other blocks attend within windows of these tokens, so their grid has to stay whole"
                )
            dead = site is not None and all(map(is_plain, typing.type(site)))
            layer = layer_name(attention)
            spelled = None if attention.target in ATTENTION else find_map(attention, typing)
            blocks.append(AttentionBlock(index, layer, attention, site, stream, axis, refusal, dead, map=spelled))
    # Removing tokens pays only while they stay removed: drop the grids that something between blocks needs whole.
    returned = _made_whole_again(blocks, with_sites)
    reason = "something between blocks needs the whole grid, so removed tokens would have to be recovered each time"
    blocks = [
        replace(b, refusal=_refusal(b.attention, reason)) if b.axis.domain.grid in returned else b for b in blocks
    ]
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
    if block.refusal is None or block.site is None or block.dead or _keeps_pictures_apart(block.attention):
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


def _refusal(attention: fx.Node, reason: str) -> Refusal:
    return refusal(attention, reason)


def self_attention_axis(node: fx.Node, typing: WholeTyping) -> TokenAxis | None:
    """Return the token axis that queries and keys share, or None where this isn't self-attention over tokens.

    Keys may be pooled; each then stands for the tokens of one cell of the queries' grid. Others, learned or computed,
    may stand before and after those of the tokens.
    """
    query, key = node.args[0], node.args[1]
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node)
    if typing.results[node].barrier:
        return None
    axis = token_axis(typing.type(query)[-2])
    same = axis is not None and keys_beside(typing.type(query), typing.type(key)) is not None
    return axis if same or pooled_to(typing.type(query), typing.type(key)) else None


def residual_add(attention: fx.Node, typing: WholeTyping) -> fx.Node | None:
    """Return the residual add after `attention`, or None.

    It is the first sum or difference after the attention in which what the attention was computed from has a fixed
    share: x + y, x - y, 0.9 * x + 0.1 * y, gamma * x + y. Where a parallel attention's result is added next, x + y + z,
    it is the sum with that.
    """
    after = descendants(attention)
    nodes: list[fx.Node] = list(attention.graph.nodes)
    for node in nodes:  # in graph order: the first one is the closest
        if node in after and (stream := stream_of(node, attention, typing)) is not None:
            return _with_parallel_attention(node, stream)
    return None


def _with_parallel_attention(add: fx.Node, stream: fx.Node) -> fx.Node:
    """Return the last sum of x + y + z + …, given x + y, whose z and others attend to the same x."""
    of_stream = descendants(stream)
    while len(add.users) == 1:
        following = next(iter(add.users))
        others = [node for node in following.all_input_nodes if node is not add]
        if following.target is not aten.add.Tensor or len(others) != 1:
            break
        made_of = (ancestors(others[0]) | {others[0]}) & of_stream
        if add in made_of or not any(node.target in (*ATTENTION, *SOFTMAXES) for node in made_of):
            break
        add = following
    return add


def stream_of(add: fx.Node, attention: fx.Node, typing: WholeTyping) -> fx.Node | None:
    """Return the stream that has a fixed share in a sum, the block's input; None where the sum is no residual one."""
    stream = share_in(add, attention, typing)
    before = ancestors(attention)
    # Go back through what only scales or turns: a share of the stream may be computed beside the attention.
    while stream is not None and stream not in before:
        tokens = [x for x in stream.all_input_nodes if typing.is_tensor(x) and not all(map(is_plain, typing.type(x)))]
        # Patches that the attention read, joined with a prefix that it read another way, are the stream as well.
        if stream.target is aten.cat.default and len(tokens) == 1 and tokens[0] in before:
            break
        # Of x + y, where y is a parallel attention's, x has a share.
        if stream.target is aten.add.Tensor and len(sides := [x for x in tokens if x in before]) == 1:
            return sides[0]
        if stream.target not in _SHARES or len(tokens) != 1 or tokens[0] is not stream.args[0]:
            return None
        stream = tokens[0]
    return None if stream is None or all(map(is_plain, typing.type(stream))) else stream


def share_in(add: fx.Node, attention: fx.Node, typing: WholeTyping) -> fx.Node | None:
    """Return the operand of a sum that doesn't depend on the attention, where the other one does; else None."""
    if add.target not in RESIDUAL_SUMS or not typing.is_tensor(add):
        return None
    after = descendants(attention) | {attention}
    operands = [arg for arg in add.args[:2] if isinstance(arg, fx.Node)]
    sides = [arg for arg in operands if arg not in after]
    if len(operands) != 2 or len(sides) != 1 or not typing.is_tensor(sides[0]):
        return None
    if add.target is aten.sub.Tensor and (sides[0] is not operands[0] or len(operands[1].users) > 1):
        return None  # half of an interpolation, x + w * (y - x) or (x - y) * w + y: its sum is the one that follows
    return sides[0]


def _joined_by(attention: fx.Node) -> str:
    """Return " (what came before it is joined to its result by aten.lerp.Scalar [model.py:3])", as far as known."""
    after, before = descendants(attention), ancestors(attention)
    for node in attention.graph.nodes:
        others = [x for x in node.all_input_nodes if x in before and not is_input(x) and tensors_of(x.meta.get("val"))]
        if node in after and others and tensors_of(node.meta.get("val")) and shape_of(node) == shape_of(others[0]):
            line = source_line(node)
            name = operator_name(node) + (f" [{line}]" if line else "")
            return f" (its result is joined with what came before it by {name})"
    return ""


def _keeps_pictures_apart(attention: fx.Node) -> bool:
    """Return whether an attention over several grids in one sequence has a mask, neither learned nor computed."""
    grid = attention.meta[MARK].axis.domain.grid
    bias = Attention.of(attention).bias if attention.target in ATTENTION else None
    if bias is None or (grid.placed and not grid.apart):
        return False
    owner = attention.graph.owning_module

    def is_given(node: fx.Node) -> bool:
        if node.op == "get_attr" and owner is not None:
            path, _, name = str(node.target).rpartition(".")
            return isinstance(getattr(owner.get_submodule(path), name), nn.Parameter)
        return is_input(node)

    return not any(map(is_given, (bias, *ancestors(bias))))


def _why_not(attention: fx.Node, site: fx.Node | None, typing: WholeTyping) -> Refusal | None:
    """Return why tokens can't be removed at a block, or None where they can."""

    def refuse(reason: str) -> Refusal:
        return _refusal(attention, reason)

    query, key = attention.args[0], attention.args[1]
    if pooled_to(typing.type(query), typing.type(key)):  # type: ignore[arg-type]
        return refuse("keys are pooled over the grid, which has to stay whole for it")
    if _keeps_pictures_apart(attention):
        return refuse(
            "several pictures stand in one sequence and a mask keeps them apart, so a token of one can't stand for "
            "another's: optimise the model for one picture a call"
        )
    if is_window(attention.meta[MARK].axis.domain.grid):
        return refuse("tokens attend within windows here, and the windows of the next block need the whole grid")
    # A site needs a residual add, live patches, and values laid out as the operators at a site take them.
    if site is None and (shared := residual_add(attention, typing)) is not None and MARK in shared.meta:
        return refuse(
            "it shares its residual add with a parallel attention, whose scores decide which tokens are removed there"
        )
    if site is None:
        return refuse(
            f"no residual add follows this attention{_joined_by(attention)}, so there is no stream to shorten"
        )
    stream = typing.type(site)
    if all(map(is_plain, stream)):
        return refuse("no output depends on patch tokens after this attention (dead tokens): there are none to remove")
    if len(stream) != 3 or token_axis(stream[1]) is None or not (is_plain(stream[0]) and is_plain(stream[2])):
        return refuse(
            f"tokens are removed from a residual stream [batch, tokens, channels], and this one has {len(stream)} "
            f"dimensions, such as [batch, height, width, channels]"
            if len(stream) != 3
            else "the three dimensions of its residual stream aren't batch, tokens and channels"
        )
    if len(typing.type(attention)) != 4:
        return refuse("queries are not laid out as [batch, heads, tokens, features]")
    if attention_dropout(attention):
        return refuse("attention dropout is active, which attention with scores does not have")
    if token_axis(typing.type(attention)[-2]) != token_axis(stream[1]):
        return refuse("the attention runs over other tokens than the residual stream")
    return None
