"""The marks that `mark_blocks` puts on a graph's nodes, by which later passes know the attention blocks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from gtp_fx.types.axes import TokenAxis

MARK = "gtp_block"
"""The key of a node's mark in its `meta`."""


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


def marks_of(graph: fx.Graph) -> tuple[tuple[fx.Node, Mark], ...]:
    """Return every marked node with its mark, in graph order."""
    return tuple((node, node.meta[MARK]) for node in graph.nodes if MARK in node.meta)
