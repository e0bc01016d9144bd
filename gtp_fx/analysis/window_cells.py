"""The cells of a window: what a window that rests is made of, each with one token that stands for its places.

A side of 7 places has two cells, of 4 and of 3; one of 14 has four, of 4, 3, 4 and 3. A window is cut in its middle
first, as shifted windows are by what wraps round, so there no cell holds places that don't see each other.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

_SIDE = 4
"""Places a cell has along a side, at most. A shorter side is one cell."""


@dataclass(frozen=True)
class Cells:
    """How the places of a window, row by row, fall into cells.

    sides: for each side of the window, how many places each cell has along it.
    """

    sides: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> Cells:
        """Return those of a window. shape: its places along each side."""
        return cls(tuple(_cut(side) for side in shape))

    @property
    def places(self) -> int:
        """The number of places in a window."""
        return math.prod(sum(side) for side in self.sides)

    @property
    def count(self) -> int:
        """The number of cells, G."""
        return math.prod(len(side) for side in self.sides)

    @property
    def sizes(self) -> np.ndarray:
        """The number of places in each cell, [G]."""
        return np.array([math.prod(cell) for cell in itertools.product(*self.sides)])

    @property
    def even(self) -> bool:
        """Whether every cell has as many places."""
        return len(set(self.sizes.tolist())) == 1

    def of_places(self) -> np.ndarray:
        """Return the cell of each place, [N]."""
        return _numbers([np.repeat(np.arange(len(side)), side) for side in self.sides], list(map(len, self.sides)))

    def middles(self, side: int | None = None) -> np.ndarray:
        """Return the place in the middle of each cell, [G]: where it reads tables that have entries for places.

        side: along this side alone; None for all of the window.
        """
        along = [np.cumsum((0, *cells[:-1])) + np.array(cells) // 2 for cells in self.sides]
        return along[side] if side is not None else _numbers(along, [sum(cells) for cells in self.sides])

    def members(self) -> np.ndarray:
        """Return the places of each cell, [G, places of the largest]; -1 fills the rows of smaller ones."""
        cell = self.of_places()
        table = np.full((self.count, self.sizes.max()), -1)
        for number in range(self.count):
            table[number, : self.sizes[number]] = np.flatnonzero(cell == number)
        return table


def _cut(side: int) -> tuple[int, ...]:
    """Return how many places the cells of one side have."""
    if side < _SIDE:
        return (side,)
    halves = (side - side // 2, side // 2)
    each = math.ceil(halves[0] / _SIDE)
    return tuple(len(part) for half in halves for part in np.array_split(np.arange(half), each))


def _numbers(along: list[np.ndarray], sizes: list[int]) -> np.ndarray:
    """Return the numbers, row by row, of all combinations of places along each side. sizes: of the sides."""
    return np.ravel_multi_index(np.meshgrid(*along, indexing="ij"), sizes).flatten()
