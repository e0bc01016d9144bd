"""Exact: mark grids whose frames are pictures of their own, because no attention block looks across them.

    [B, F, H·W, C] -> cat CLS -> [B·F, 1 + H·W, C] -> blocks -> [B, F, 1 + H·W, C] -> CLS of each frame, or their mean

Each side of a grid of three or more is taken for frames on trial. The mark is kept where tokens can then be removed,
which they couldn't before: something that needs one place in several frames (attention over time, a convolution)
between the blocks would have to have every token back, and speaks against it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.analysis.blocks import AttentionBlock
from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.graph.edit import copy_of
from gtp_fx.graph.nodes import ancestors, count_nodes, tensors_of
from gtp_fx.graph.operators import ATTENTION, GRID_MAKERS, MATRIX_PRODUCTS, SOFTMAXES
from gtp_fx.passes.exact.mark_tokens import blocks_of, with_blocks_marked
from gtp_fx.types.coercions import find_coercions
from gtp_fx.types.frames import FRAMES
from gtp_fx.types.grids import GridAxis
from gtp_fx.types.merging import split_tokens

_LAYERS = (aten.linear.default, *MATRIX_PRODUCTS, *ATTENTION)
_FEWEST_SIDES = 3
"""Of a grid that holds frames: theirs, and two of a picture."""


def mark_frames(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of `gm` in which frames are told apart; `gm` itself where nothing is gained by it."""
    births = list(_births(gm))
    if not births or not count_nodes(gm.graph, (*ATTENTION, *SOFTMAXES)):
        return gm
    shortened = {block.axis.domain.grid.birth for block in blocks_of(with_blocks_marked(gm)) if block.refusal is None}
    for name, sides in births:
        if name in shortened:
            continue
        for side in range(sides):
            trial = copy_of(gm)
            next(node for node in trial.graph.nodes if node.name == name).meta[FRAMES] = side
            spelled = with_blocks_marked(trial)
            blocks = blocks_of(spelled)
            gained = [b for b in blocks if b.axis.domain.grid.birth == name and b.refusal is None]
            if gained and not _obstructed(spelled, gained):
                gm = trial
                break
    return gm


def _may_be_born(node: fx.Node) -> bool:
    """Tell whether a value has sides, a batch and features, before any layer, or as one that works on the sides."""
    if max((value.dim() for value in tensors_of(node.meta.get("val"))), default=0) < _FEWEST_SIDES + 2:
        return False
    return node.target in GRID_MAKERS or not any(
        before.target in (*GRID_MAKERS, *_LAYERS) for before in ancestors(node)
    )


def _obstructed(gm: fx.GraphModule, blocks: Sequence[AttentionBlock]) -> bool:
    """Tell whether something needs tokens that these blocks would remove, and can't get them back."""
    sites = frozenset(block.site for block in blocks if block.site is not None)
    return bool(find_coercions(typed_graph(gm.graph).with_sites(sites)).refused)


def _births(gm: fx.GraphModule) -> Iterator[tuple[str, int]]:
    """Yield the name of each node at which a grid of three or more sides is born, and how many those are."""
    if not any(map(_may_be_born, gm.graph.nodes)):
        return
    typing = typed_graph(gm.graph).whole
    for node in gm.graph.nodes:
        if not typing.is_tensor(node):
            continue
        grids = {f.grid for dim in typing.type(node) for f in split_tokens(dim) if isinstance(f, GridAxis)}
        for grid in grids:
            if grid.birth == node.name and len(grid.shape) >= _FEWEST_SIDES and not grid.apart:
                yield node.name, len(grid.shape)
