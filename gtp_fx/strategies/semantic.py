"""STViT (arXiv 2303.08685): a cell's patches become one semantic token, updated by attending to all patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from gtp_fx.strategies.grouping import Grouping
from gtp_fx.strategies.registry import register_strategy
from gtp_fx.strategies.sites import OWN_QUERIES
from gtp_fx.strategies.tokens import Groups, Tokens, averaged, split
from gtp_fx.types.axes import TokenAxis
from gtp_fx.types.places import home_of


@register_strategy
@dataclass(frozen=True)
class Semantic(Grouping):
    """Semantic tokens: the patches of each cell of the grid are pooled, and what is pooled attends to all patches.

    With x the tokens that enter a block, and P the mean over cells, which leaves prefix tokens alone:

        s   =  P(x)
        s'  =  s + attention(queries of s, keys and values of x)        s'  ->  s' + MLP(s')

    by the block's own weights and norms. The semantic tokens are carried on in the patches' place. A site that removes
    n - m of n patches makes m cells, the same ones in every image: the grid is halved along its longest side, each half
    gets its share of the m cells by its size, and so on until a part has one. So 4, 16 or 64 cells of a square grid are
    a square of cells, as in the publication, and any other number can be had. Cells for fewer tokens are unions of
    those for more, so that a later site pools semantic tokens in the same way, each weighted by the patches that it
    stands for. For positions that are read later, a semantic token has the place of the one nearest to its cell's
    middle.

    docs/method.md says where this departs from the publication.

    token_scale: adds the log of a token's patch count to attention's logits, which the publication doesn't do.
    """

    name: ClassVar[str] = "semantic"
    merges: ClassVar[bool] = True
    sized: ClassVar[bool] = True
    before_attention: ClassVar[bool] = True
    shortens_queries: ClassVar[bool] = True
    recovers_updates: ClassVar[bool] = True
    token_scale: bool = False

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
            return ""
        return (
            "semantic tokens attend to the patches that they are made of, and in this block queries can't be computed "
            "apart from keys and values (its attention is spelled out, one layer that has to stay whole makes all "
            "three, or its bias is computed from the same tokens)"
        )

    def group(self, tokens: Tokens) -> Groups:
        # One image says what is done with all: nothing here depends on what tokens hold.
        index_1n = tokens.index_Bn[:1]
        # Twice the distance from the middle of a cell, squared; of equally near ones the first is the nearest. A cell
        # is known by its first patch.
        off_1n, cell_1n, step = torch.zeros_like(index_1n), index_1n, 1
        sides = zip(*cells(index_1n, list(tokens.grid), tokens.count - tokens.removed), tokens.grid, strict=True)
        for at_1n, length_1n, side in reversed(list(sides)):
            off_1n = off_1n + (2 * at_1n + 1 - length_1n) ** 2
            cell_1n, step = cell_1n - step * at_1n, step * abs(side)
        order_1n = off_1n * step + index_1n
        together_1nn = cell_1n[:, :, None] == cell_1n[:, None, :]
        nearer_1nn = order_1n[:, None, :] < order_1n[:, :, None]
        kept_1K, removed_1P = split((~(together_1nn & nearer_1nn).any(dim=-1)).float(), tokens.removed)
        cell_1K, cell_1P = cell_1n.gather(1, kept_1K), cell_1n.gather(1, removed_1P)
        into_1P = (cell_1P[:, :, None] == cell_1K[:, None, :]).float().argmax(dim=-1)
        images = tokens.x_BNC.shape[0]
        return averaged(tokens, *(index.expand(images, -1) for index in (kept_1K, removed_1P, into_1P)))


def cells(index_Bn: Tensor, grid: list[int], count: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return where each patch is in its cell, of `count` cells of the grid, and how long the cell is.

    Each is [B, n] for each of the grid's sides. Every cell has a patch, and cells for a smaller count are unions of
    these: where a part is halved doesn't depend on the count, and its halves' shares never fall as that rises.

    index_Bn: patches, by their positions on the whole grid.
    grid: its sides; a first one that is negative counts grids that are apart, which are told apart first.
    """
    at, length = _places(index_Bn, grid), [torch.full_like(index_Bn, abs(side)) for side in grid]
    mine_Bn = torch.full_like(index_Bn, count)  # cells in the patch's part
    for side in _halvings(grid):
        # A part of one cell, or one place long, stays whole: its first half is empty and has no share.
        half = (length[side] // 2) * (mine_Bn > 1)
        first = at[side] < half
        share = (2 * mine_Bn * half + length[side]) // (2 * length[side])  # rounded; the second half has the others
        mine_Bn = torch.where(first, share, mine_Bn - share)
        length[side] = torch.where(first, half, length[side] - half)
        at[side] = torch.where(first, at[side], at[side] - half)
    return at, length


def _halvings(grid: list[int]) -> list[int]:
    """Return which side is halved after which, until every part is one patch: the longest, of equal ones the first."""
    lengths = [abs(side) for side in grid]
    found = []
    while max(lengths) > 1:
        apart = grid[0] < 0 and lengths[0] > 1
        side = 0 if apart else lengths.index(max(lengths))
        lengths[side] -= lengths[side] // 2
        found.append(side)
    return found


def _places(index_Bn: Tensor, grid: list[int]) -> list[Tensor]:
    """Return the coordinate of each patch along each side of the grid, [B, n] each."""
    here = []
    for side in reversed(grid[1:]):
        here.append(index_Bn % side)
        index_Bn = index_Bn // side
    return [index_Bn, *reversed(here)]
