"""Factors merged into dimensions, and taken apart again."""

from __future__ import annotations

from gtp_fx.types.axes import Plain, TokenAxis, TokenDomain, token_axis
from gtp_fx.types.grids import Grid, GridAxis
from gtp_fx.types.merging import merge_grids, split_tokens

GRID = Grid("conv", (3, 2))
TOKENS = TokenAxis(TokenDomain(GRID))


def test_sides_of_a_grid_merge_in_row_major_order_only() -> None:
    rows, columns = GridAxis(GRID, 0), GridAxis(GRID, 1)
    assert merge_grids((rows, columns)) == (TOKENS,)
    by_columns = token_axis(merge_grids((columns, rows)))
    assert by_columns is not None and by_columns.domain != TOKENS.domain, "the same patches in another order"
    assert split_tokens((by_columns,)) == (columns, rows)
    assert split_tokens((Plain(2), TOKENS)) == (Plain(2), rows, columns)
    with_prefix = TokenAxis(TOKENS.domain, prefix=1)
    assert split_tokens((with_prefix,)) == (with_prefix,), "a grid with a CLS token in front is no grid"
