"""Patch grids: what tokens a value has, where they came from, and in which order they lie.

A grid is known by the node that made it. Operators derive others from it: rolled, flipped, padded, of other images, one
window of it, or picked by numbers. Each remembers what it is of, so undoing what was done gives the first grid again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Picked:
    """How a row of tokens was picked from the patches of a grid by numbers that a tensor holds.

    grid: what they were picked from.
    index: name of the node that holds the numbers: [K], the same for all images, or [B, K], and features after them
        that all say the same. Empty where the picks of one image can't be told.
    own: each image has picks of its own.
    """

    grid: Grid
    index: str
    own: bool


@dataclass(frozen=True)
class Grid:
    """A patch grid.

    birth: name of the node that made it.
    shape: its sides in patches, row-major, of any rank.
    shift: how far each side was rolled; () where none was.
    inside: for a padded grid, the grid that its leading rows and columns are.
    parts: for a region, its sides as parts of another grid's sides. Regions at all places are one Grid, since the
        windows of a shifted-window transformer are alike.
    placed: whether its patches have places on an image. False for tokens that came in as an argument: they are a row
        in the order they came in, and nothing is known to be next to anything.
    guarded: whether the tokens before the patches are kept on suspicion: CLS and registers may be among them.
    apart: whether its first side counts several grids in one sequence (pictures, frames, groups of bands), whose
        patches are next to others of their own grid alone.
    flipped: the sides that run backward, in order.
    picked: for a row of tokens that were picked by their numbers, from where.
    """

    birth: str
    shape: tuple[int, ...]
    shift: tuple[int, ...] = ()
    inside: Grid | None = None
    parts: tuple[GridAxis, ...] = ()
    placed: bool = True
    guarded: bool = False
    apart: bool = False
    flipped: tuple[int, ...] = ()
    picked: Picked | None = None

    @property
    def sides(self) -> list[int]:
        """Return its sides as operators take them: the first one is negative where it counts grids that are apart."""
        return [-self.shape[0], *self.shape[1:]] if self.apart else list(self.shape)

    @staticmethod
    def of_several(birth: str, grids: Sequence[Grid]) -> Grid:
        """Return the grid of the patches of several grids, end to end.

        Of one shape, they are its first side. Otherwise nothing is known to be next to anything.
        """
        shapes = {grid.shape for grid in grids}
        if len(shapes) == 1 and all(grid.placed and not grid.apart and not grid.shift for grid in grids):
            return Grid(birth, (len(grids), *shapes.pop()), apart=True)
        return Grid(birth, (sum(math.prod(grid.shape) for grid in grids),), placed=False)

    def rolled(self, by: Sequence[int]) -> Grid:
        """Return the same patches with those at i now at i + by. Rolled back, it is the original grid."""
        before = self.shift or (0,) * len(self.shape)
        shift = tuple((a + b) % size for a, b, size in zip(before, by, self.shape, strict=True))
        return replace(self, shift=shift if any(shift) else ())

    def turned(self, sides: Iterable[int]) -> Grid:
        """Return the same patches with some sides in the other direction. Turned back, it is the original grid.

        What was rolled forward is rolled backward by that: a grid is flipped first and rolled then.
        """
        sides = set(sides)
        shift = tuple(
            -by % size if side in sides else by
            for side, (by, size) in enumerate(zip(self.shift, self.shape, strict=False))
        )
        return replace(self, shift=shift, flipped=tuple(sorted(sides ^ set(self.flipped))))

    def of_other_images(self, where: str) -> Grid:
        """Return the same grid of other images: a part of the batch, several batches joined, one in another order.

        Places pair one by one, as long as all tokens are there; which of them are removed is decided anew.

        where: the operator, which names the new grid.
        """
        inside = None if self.inside is None else self.inside.of_other_images(where)
        parts = tuple(replace(part, grid=part.grid.of_other_images(where)) for part in self.parts)
        picked = None if self.picked is None else replace(self.picked, grid=self.picked.grid.of_other_images(where))
        if picked is not None and picked.own:
            picked = replace(picked, index="")
        return replace(self, birth=f"{self.birth}@{where}", inside=inside, parts=parts, picked=picked)

    def resized(self, side: int, size: int) -> Grid:
        """Crop one side of a padded grid. Cropping every side back to the unpadded shape gives that grid itself."""
        shape = (*self.shape[:side], size, *self.shape[side + 1 :])
        return self.inside if self.inside is not None and shape == self.inside.shape else replace(self, shape=shape)


@dataclass(frozen=True)
class GridAxis:
    """A side of a patch grid that has not been flattened yet, or a part of one.

    A side of 56 in windows of 7 has two parts: which window (8 places, 7 apart) and where in it (7 places, 1 apart).

    grid: the patch grid.
    side: number of the side.
    count: number of places; 0 for the whole side.
    stride: distance from one place to the next.
    """

    grid: Grid
    side: int
    count: int = 0
    stride: int = 1

    @property
    def whole_size(self) -> int:
        """Return the number of places."""
        return self.count or self.grid.shape[self.side]

    def split(self, outer: int) -> tuple[GridAxis, GridAxis]:
        """Split it into `outer` places far apart and the places between them; `outer` divides the size."""
        inner = self.whole_size // outer
        far = replace(self, count=outer, stride=self.stride * inner)
        return far.canonical(), replace(self, count=inner).canonical()

    def canonical(self) -> GridAxis:
        """Return the whole side for all its places, one apart; anything else as it is."""
        whole = self.count == self.grid.shape[self.side] and self.stride == 1
        return replace(self, count=0) if whole else self

    def joined(self, inner: GridAxis) -> GridAxis | None:
        """Join this part and a part further in, where they are adjacent parts of one side; None where they aren't."""
        same = (self.grid, self.side) == (inner.grid, inner.side)
        if not same or self.stride != inner.stride * inner.whole_size:
            return None
        return replace(inner, count=self.whole_size * inner.whole_size).canonical()
