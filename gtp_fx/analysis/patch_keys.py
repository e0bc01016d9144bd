"""Cells of a window that rests, attending to all of the window's patches: what runs on cells then, and what on patches.

    patches ─── norm ─ k, v ─────┐
    cells ──┬─ norm ─ q ─ attention ─ … ─ add ─┬─ norm ─ MLP ─ add
            └──────────────────────────────────┘

A projection that makes queries, keys and values at once has only the rows computed for each that are read there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from torch import fx

from gtp_fx.analysis.fused_projections import rows_for
from gtp_fx.analysis.window_forms import NoRest
from gtp_fx.analysis.window_steps import Step
from gtp_fx.graph.nodes import ancestors, descendants
from gtp_fx.graph.symbols import shape_of
from gtp_fx.strategies.sites import Attention


@dataclass(frozen=True)
class PatchKeys:
    """What of a block runs on cells and what on patches.

    attends: what the attention does for queries of cells and keys of all places.
    of_cells: the block's nodes that run on cells. of_patches: those by which keys and values are made of patches.
    rows_of_cells, rows_of_patches: of projections that can be split, how many rows are computed for either.
    """

    attends: Step
    of_cells: frozenset[fx.Node]
    of_patches: frozenset[fx.Node]
    rows_of_cells: Mapping[fx.Node, int]
    rows_of_patches: Mapping[fx.Node, int]

    def share(self, node: fx.Node, fewer: Fraction) -> Fraction:
        """Return the share of a node's work for a window that is done where the window rests.

        fewer: cells for each place.
        """
        cells = fewer * _part(node, self.rows_of_cells) if node in self.of_cells else Fraction(0)
        return cells + (_part(node, self.rows_of_patches) if node in self.of_patches else 0)

    def copied(self, at: Mapping[fx.Node, fx.Node]) -> PatchKeys:
        """Return this in a copy of the graph. at: each node's copy."""
        cells, patches = (frozenset(at[node] for node in nodes) for nodes in (self.of_cells, self.of_patches))
        rows = ({at[n]: count for n, count in of.items()} for of in (self.rows_of_cells, self.rows_of_patches))
        return PatchKeys(self.attends.copied(at), cells, patches, *rows)


def find_patch_keys(attention: fx.Node, nodes: Sequence[fx.Node], coarse: Sequence[Step]) -> PatchKeys | NoRest:
    """Return what of a block runs on cells and what on patches, or why cells can't attend to patches.

    nodes: the block's, its result last. coarse: what they do where everything runs on cells.
    """
    operands, inside = Attention.of(attention), set(nodes)
    if operands.bias in inside:
        return NoRest("the bias of its attention is computed from its tokens")
    if operands.q in (operands.k, operands.v):
        return NoRest("its queries are its keys or values")
    of_patches = frozenset(_back_from([operands.k, operands.v], inside))
    # Of what attention reads the queries alone are of cells.
    after = descendants(attention) & inside
    read = {operand for node in after for operand in node.all_input_nodes}
    before = list((read & inside) - after - {attention})
    of_cells = frozenset({attention, *after, *_back_from([operands.q, *before], inside)})
    (step,) = (step for step in coarse if step.node is attention)
    attends = replace(step, sampled=tuple(sampled for sampled in step.sampled if sampled.dim == -2))
    return PatchKeys(attends, of_cells, of_patches, rows_for(of_cells), rows_for(of_patches))


def _back_from(ends: Sequence[fx.Node], inside: set[fx.Node]) -> set[fx.Node]:
    """Return some of the block's nodes and those of it that they are computed by."""
    return {node for end in ends for node in (end, *ancestors(end)) if node in inside}


def _part(node: fx.Node, rows: Mapping[fx.Node, int]) -> Fraction:
    """Return the share of a projection's rows that is computed."""
    return Fraction(rows[node], shape_of(node)[-1]) if node in rows else Fraction(1)
