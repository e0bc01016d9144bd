"""Cells of windows: how places fall into them, and what they read."""

from __future__ import annotations

import numpy as np
import pytest

from gtp_fx.analysis.window_cells import Cells


@pytest.mark.parametrize(
    ("side", "cells"),
    [(1, (1,)), (3, (3,)), (4, (2, 2)), (7, (4, 3)), (8, (4, 4)), (12, (3, 3, 3, 3)), (14, (4, 3, 4, 3))],
)
def test_a_side_is_cut_in_its_middle_then_in_parts_of_four_at_most(side: int, cells: tuple[int, ...]) -> None:
    """So that a shifted window, which wraps round behind its longer half, has no cell on both sides of that."""
    assert Cells.of((side,)).sides == (cells,)


def test_places_go_row_by_row() -> None:
    cells = Cells.of((7, 4))
    assert (cells.places, cells.count, cells.even) == (28, 4, False)
    plane = cells.of_places().reshape(7, 4)
    assert plane[0].tolist() == [0, 0, 1, 1] and plane[:, 0].tolist() == [0] * 4 + [2] * 3
    assert cells.sizes.tolist() == [8, 8, 6, 6]
    members = cells.members()
    assert members.shape == (4, 8) and sorted(members[members >= 0].tolist()) == list(range(28))
    assert all(cells.of_places()[place] == cell for cell, row in enumerate(members) for place in row[row >= 0])
    # In the middle of each: rows 2 and 5, columns 1 and 3.
    assert cells.middles().tolist() == [2 * 4 + 1, 2 * 4 + 3, 5 * 4 + 1, 5 * 4 + 3]
    assert (cells.middles(0).tolist(), cells.middles(1).tolist()) == ([2, 5], [1, 3])


def test_a_table_of_two_sides_read_at_the_middles_of_each_is_the_one_of_all_places_read_at_theirs() -> None:
    cells = Cells.of((7, 8))
    table = np.arange(56).reshape(7, 8)
    assert table[np.ix_(cells.middles(0), cells.middles(1))].flatten().tolist() == cells.middles().tolist()
