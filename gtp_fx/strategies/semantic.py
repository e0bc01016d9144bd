"""STViT (arXiv 2303.08685): a cell's patches become one semantic token, updated by attending to all patches."""

from __future__ import annotations

import math
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
    n - m of n patches makes m cells, the same ones in every image: the grid is halved along its longer side, each half
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
        low_R1n, high_R1n = cells(index_1n, list(tokens.grid), tokens.count - tokens.removed)
        here_R1n = _places(index_1n, list(tokens.grid))
        # Twice the distance from the middle of a cell, squared; of equally near ones the first is the nearest.
        sides = zip(here_R1n, low_R1n, high_R1n, strict=True)
        off_1n = torch.stack([(2 * at + 1 - low - high) ** 2 for at, low, high in sides]).sum(dim=0)
        order_1n = off_1n * math.prod(map(abs, tokens.grid)) + index_1n
        cell_1n = low_R1n[0]
        for low, side in zip(low_R1n[1:], tokens.grid[1:], strict=True):
            cell_1n = cell_1n * side + low
        together_1nn = cell_1n[:, :, None] == cell_1n[:, None, :]
        nearer_1nn = order_1n[:, None, :] < order_1n[:, :, None]
        kept_1K, removed_1P = split((~(together_1nn & nearer_1nn).any(dim=-1)).float(), tokens.removed)
        cell_1K, cell_1P = cell_1n.gather(1, kept_1K), cell_1n.gather(1, removed_1P)
        into_1P = (cell_1P[:, :, None] == cell_1K[:, None, :]).float().argmax(dim=-1)
        images = tokens.x_BNC.shape[0]
        return averaged(tokens, *(index.expand(images, -1) for index in (kept_1K, removed_1P, into_1P)))


def cells(index_Bn: Tensor, grid: list[int], count: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the cell that each patch is in, of `count` cells of the grid: its first place and the one after its last.

    Each is [B, n] for each of the grid's sides. Every cell has a patch, and cells for a smaller count are unions of
    these: where a part is halved doesn't depend on the count, and its halves' shares never fall as that rises.

    index_Bn: patches, by their positions on the whole grid.
    grid: its sides; a first one that is negative counts grids that are apart, which are told apart first.
    """
    sides = [abs(side) for side in grid]
    here = _places(index_Bn, grid)
    low = [torch.zeros_like(index_Bn) for _ in sides]
    high = [torch.full_like(index_Bn, side) for side in sides]
    mine_Bn = torch.full_like(index_Bn, count)
    # A side of 2^k places can be halved k times.
    for _ in range(sum((side - 1).bit_length() for side in sides)):
        lengths = [after - first - 1 for first, after in zip(low, high, strict=True)]
        if grid[0] < 0:
            lengths[0] = lengths[0] * math.prod(sides)
        most, longest = lengths[0], torch.zeros_like(index_Bn)
        for side, length in enumerate(lengths[1:], start=1):
            longest, most = torch.where(length > most, side, longest), torch.maximum(length, most)
        halved = mine_Bn > 1
        for side, at in enumerate(here):
            length = high[side] - low[side]
            first_half = length // 2
            middle = low[side] + first_half
            cut = halved & (longest == side)
            first = at < middle
            # The first half's share, rounded; the second half has the others.
            share = (2 * mine_Bn * first_half + length) // (2 * length)
            mine_Bn = torch.where(cut, torch.where(first, share, mine_Bn - share), mine_Bn)
            high[side] = torch.where(cut & first, middle, high[side])
            low[side] = torch.where(cut & ~first, middle, low[side])
    return low, high


def _places(index_Bn: Tensor, grid: list[int]) -> list[Tensor]:
    """Return the coordinate of each patch along each side of the grid, [B, n] each."""
    here = []
    for side in reversed(grid[1:]):
        here.append(index_Bn % side)
        index_Bn = index_Bn // side
    return [index_Bn, *reversed(here)]
