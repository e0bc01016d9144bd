"""STViT (arXiv 2303.08685): a cell's patches become one semantic token, updated by attending to all patches."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from gtp_fx.errors import OptionError, did_you_mean
from gtp_fx.strategies.grouping import Grouping
from gtp_fx.strategies.registry import register_strategy
from gtp_fx.strategies.sites import NO_MAP, OWN_QUERIES
from gtp_fx.strategies.tokens import Groups, Tokens, averaged, split
from gtp_fx.types.axes import TokenAxis
from gtp_fx.types.places import home_of

RECOVERIES = {
    "cells": "it changes as the semantic token of its cell",
    "attention": "it changes as those that it attends to, by the weights of the block where it was pooled",
}
"""How a patch that was pooled comes back where every patch is read."""


@register_strategy
@dataclass(frozen=True)
class Semantic(Grouping):
    """Semantic tokens: the patches of each cell of the grid are pooled, and what is pooled attends to all patches.

    With x the tokens that enter a block, and P the mean over cells, which leaves prefix tokens alone:

        s   =  P(x)
        s'  =  s + attention(queries of s, keys and values of x)        s'  ->  s' + MLP(s')

    by the block's own weights and norms. The semantic tokens are carried on in the patches' place. A site that removes
    n - m of n patches makes m cells, the same ones in every image: the grid is halved along its longest side, each half
    gets its share of the m cells by its size, rounded, and so on until a part has one. So 4 or 16 cells of 8 x 8
    patches are those of adaptive pooling, and any other number can be had. Cells for fewer tokens are unions of those
    for more, so that a later site pools semantic tokens in the same way, each weighted by the patches that it stands
    for. For positions that are read later, a semantic token has the place of the one nearest to its cell's middle.

    Where a block attends in windows and keeps them apart, whole ones are pooled: those whose tokens differ least, by
    cells of up to 4 x 4. There too, what is pooled attends to all patches of the window, and each patch gets what its
    cell changes by. A schedule counts windows.

    docs/method.md says where this departs from the publication.

    token_scale: adds the log of a token's patch count to attention's logits, which the publication doesn't do.
    recovery: where every patch is read, a removed one is what it was plus R @ (the change since then of the tokens that
        its site left, each from what the patch in its place was). "cells": R takes that of the patch's own cell.
        "attention", STViT-R's: R [removed, cells] is softmax(q·kᵀ/√D), the mean over heads, with queries of the removed
        patches and keys of the semantic tokens, made by the norm and the projections of the block where the site
        stands. Attention with a bias is refused then. Nothing is trained for it; "cells" has kept more.
    """

    name: ClassVar[str] = "semantic"
    merges: ClassVar[bool] = True
    sized: ClassVar[bool] = True
    before_attention: ClassVar[bool] = True
    shortens_queries: ClassVar[bool] = True
    recovers_updates: ClassVar[bool] = True
    rest_keys: ClassVar[str] = "patches"
    token_scale: bool = False
    recovery: str = "cells"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recovery not in RECOVERIES:
            names = "\n".join(f"  {name!r}: {meaning}" for name, meaning in RECOVERIES.items())
            meant = did_you_mean(str(self.recovery), RECOVERIES)
            raise OptionError(
                f"Semantic(recovery={self.recovery!r}) is unknown{meant or ';'} recovery is one of\n{names}"
            )

    @property
    def rests_windows(self) -> bool:
        """Return True: in windows, whole ones are pooled."""
        return True

    @property
    def rest_share(self) -> float:
        """Return 1: a patch gets all that its semantic token has changed by."""
        return 1.0

    @property
    def recovers_by_attention(self) -> bool:
        """Return whether removed tokens are recovered by attention over what their site left."""
        return self.recovery == "attention"

    def refuse(self, axis: TokenAxis, skipping: bool = False) -> str:
        grid = axis.domain.grid
        if not skipping and (not grid.placed or home_of(grid) != grid):
            return (
                "it pools cells of a grid, and these tokens have no places on one (they come in as an argument, say) "
                "or aren't in its order"
            )
        return super().refuse(axis, skipping)

    def refuse_stream(self, stream: fx.Node, axis: TokenAxis) -> str:
        if OWN_QUERIES in stream.meta:
            why = stream.meta[NO_MAP] if self.recovers_by_attention else ""
            return why and f"recovery='attention' takes the block's queries and keys alone, and {why}"
        return (
            "semantic tokens attend to the patches that they are made of, and in this block queries can't be computed "
            "apart from keys and values (its attention is spelled out, one product makes all three and can't be "
            "split, as torch.nn.MultiheadAttention's, or its bias is computed from the same tokens)"
        )

    def group(self, tokens: Tokens) -> Groups:
        # One image says what is done with all: nothing here depends on what tokens hold.
        index_1n = tokens.index_Bn[:1]
        tables = cells(tokens.grid, tokens.count - tokens.removed)
        cell_1n, off_1n = (torch.tensor(table, device=index_1n.device)[index_1n] for table in tables)
        order_1n = off_1n * len(tables[0]) + index_1n  # of equally near ones the first is the nearest
        together_1nn = cell_1n[:, :, None] == cell_1n[:, None, :]
        nearer_1nn = order_1n[:, None, :] < order_1n[:, :, None]
        kept_1K, removed_1P = split((~(together_1nn & nearer_1nn).any(dim=-1)).float(), tokens.removed)
        cell_1K, cell_1P = cell_1n.gather(1, kept_1K), cell_1n.gather(1, removed_1P)
        into_1P = (cell_1P[:, :, None] == cell_1K[:, None, :]).float().argmax(dim=-1)
        images = tokens.x_BNC.shape[0]
        return averaged(tokens, *(index.expand(images, -1) for index in (kept_1K, removed_1P, into_1P)))


@functools.cache
def cells(grid: tuple[int, ...], count: int) -> tuple[list[int], list[int]]:
    """Return for each patch of a grid the number of its cell, of `count` cells, and how far it is from their middles.

    Every cell has a patch, and cells for a smaller count are unions of these: where a part is halved doesn't depend on
    the count, and its halves' shares never fall as that rises. Distances are squared, of twice the places.

    grid: its sides; a first one that is negative counts grids that are apart, which are told apart first.
    """
    sides = [abs(side) for side in grid]
    strides = [math.prod(sides[side + 1 :]) for side in range(len(sides))]
    number, off = [0] * math.prod(sides), [0] * math.prod(sides)
    pending, made = [(tuple(map(range, sides)), count)], 0
    while pending:
        part, mine = pending.pop()
        lengths = [len(places) for places in part]
        if mine == 1:
            for patch in itertools.product(*part):
                at = sum(place * stride for place, stride in zip(patch, strides, strict=True))
                number[at] = made
                off[at] = sum((2 * x - p[0] - p[-1]) ** 2 for x, p in zip(patch, part, strict=True))
            made += 1
            continue
        side = 0 if grid[0] < 0 and lengths[0] > 1 else lengths.index(max(lengths))
        half = lengths[side] // 2
        share = (2 * mine * half + lengths[side]) // (2 * lengths[side])  # rounded; the second half has the others
        for places, of_them in ((part[side][:half], share), (part[side][half:], mine - share)):
            pending.append(((*part[:side], places, *part[side + 1 :]), of_them))
    return number, off
