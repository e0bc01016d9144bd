"""Exact: mark the attention blocks: self-attention over tokens, and the residual add that ends its half of the block.

    x ──┬─ norm ─ q, k, v ─ attention ─ projection ─ (scale) ─ add ── site
        └──────────────────────────────────────────────────────┘

No class or layer names are used. Attention is an operator whose queries and keys run over the same token axis, or a
product of a map and values that stays spelled out (`gtp_fx.analysis.attention_maps`); the residual add is the first
addition after it whose other operand the attention itself depends on. That holds for pre-norm, post-norm, LayerScale
and parallel blocks alike, and distinguishes a residual from a bias or a mask.

The pass only marks nodes (`meta["gtp_block"]`, a `Mark`), so that later passes can rewrite around the marks;
`gtp_fx.analysis.blocks` reads them. Blocks are numbered in graph order, which is the schedule's order.
"""

from __future__ import annotations

from torch import fx

from gtp_fx.analysis.attention_maps import find_map
from gtp_fx.analysis.marks import MARK, Mark
from gtp_fx.analysis.queries_and_keys import keys_beside, pooled_to
from gtp_fx.analysis.residual_adds import residual_add
from gtp_fx.analysis.token_states import state_after
from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.graph.edit import copy_of
from gtp_fx.graph.operators import ATTENTION, MATRIX_PRODUCTS
from gtp_fx.types.axes import Plain, TokenAxis, token_axis
from gtp_fx.types.grids import Grid
from gtp_fx.types.infer import WholeTyping
from gtp_fx.types.layouts import base_of
from gtp_fx.types.rules.registry import WEIGHS


def mark_blocks(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of `gm` with its blocks marked."""
    gm = copy_of(gm)
    typing = typed_graph(gm.graph).whole  # marks change no type of whole values, so these types remain valid
    index = 0
    for node in gm.graph.nodes:
        spelled = find_map(node, typing) if node.target in MATRIX_PRODUCTS else None
        axis = self_attention_axis(node, typing) if node.target in ATTENTION or spelled is not None else None
        if axis is None:
            continue
        for over_row in () if spelled is None else spelled.over_rows:
            over_row.meta[WEIGHS] = True
        node.meta[MARK] = Mark(index, "attention", axis)
        site = residual_add(node, typing) or state_after(node, axis, typing)
        if site is not None and MARK not in site.meta:
            site.meta[MARK] = Mark(index, "site", axis)
        index += 1
    return gm


def self_attention_axis(node: fx.Node, typing: WholeTyping) -> TokenAxis | None:
    """Return the token axis that queries and keys share, or None where this isn't self-attention over tokens.

    Keys may be pooled; each then stands for the tokens of one cell of the queries' grid. Others, learned or computed,
    may stand before and after those of the tokens.
    """
    query, key = node.args[0], node.args[1]
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node)
    if typing.results[node].barrier:
        return None
    axis, keys = (token_axis(typing.type(operand)[-2]) for operand in (query, key))
    if axis is None or keys is None:
        return None
    if keys_beside(typing.type(query), typing.type(key)) is not None:
        return axis
    pooled = pooled_to(typing.type(query), typing.type(key)) and _is_made_of(keys.domain.grid, axis.domain.grid, typing)
    return axis if pooled else None


def _is_made_of(cells: Grid, grid: Grid, typing: WholeTyping) -> bool:
    """Return whether the tokens of one grid are born of another's, as far as it is known where they are born.

    Those of another picture aren't, though it may have as many.
    """
    nodes = {node.name: node for node in typing.graph.nodes}
    pending, seen = [cells], {cells}
    while pending:
        born = nodes.get(base_of(pending.pop()).birth.partition("@")[0])
        if born is None:
            return True
        kinds = [typing.type(x) for x in born.all_input_nodes if typing.is_tensor(x)]
        factors = [factor for kind in kinds for dim in kind for factor in dim if not isinstance(factor, Plain)]
        read = {factor.domain.grid if isinstance(factor, TokenAxis) else factor.grid for factor in factors}
        if base_of(grid) in map(base_of, read):
            return True
        pending += read - seen
        seen |= read
    return False
