"""Token axes: the type of a tensor says, for each of its dimensions, which tokens it runs over.

The nouns, from small to large:

    Grid         a patch grid that a convolution makes, e.g. 14x14, known by the node that made it; or a grid derived
                 from one: rolled, padded, or a region (a window) of it
    TokenDomain  the patch tokens of one grid that remain in the stream: all of them at level 0; at level k, those
                 that remain after the k-th propagation site
    Factor       what a dimension is made of: Plain (channels, heads, batch), GridAxis (one side of a grid, or a part
                 of one: which window, or where in it), or TokenAxis (prefix tokens, then the patches of a domain,
                 then suffix tokens)
    Dim          a product of factors, outermost first: the 1576 of a [B*N, C] tensor is (Plain(8), TokenAxis(...))
    TensorType   one Dim for each dimension

A type knows the *original* size of each of its factors, so a shape in the graph can be matched against it. It also
knows the domain, so the size that a shape must have after tokens are removed is computed instead of guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from gtp_fx.graph.symbols import is_symbolic


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
class TokenDomain:
    """The patch tokens of `grid` that remain in the stream after `level` propagation sites."""

    grid: Grid
    level: int = 0

    @property
    def whole_count(self) -> int:
        """Return the number of patch tokens at level 0, before any is removed."""
        return math.prod(self.grid.shape)

    def at(self, level: int) -> TokenDomain:
        """Return the same grid's domain at another level."""
        return replace(self, level=level)


@dataclass(frozen=True)
class Plain:
    """A dimension, or a part of one, that doesn't run over tokens.

    size: number of entries; a symbolic size is a prime (see `symbols`).
    images: it is known to be the batch that a grid was born with, so no other dimension of that size is taken for it.
    """

    size: int
    images: bool = field(default=False, compare=False)

    @property
    def whole_size(self) -> int:
        """Return the size."""
        return self.size


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


@dataclass(frozen=True)
class TokenAxis:
    """A dimension of tokens.

    domain: the patches.
    prefix: tokens before the patches that are never removed (CLS, registers).
    suffix: tokens after the patches that are never removed.
    """

    domain: TokenDomain
    prefix: int = 0
    suffix: int = 0

    @property
    def whole_size(self) -> int:
        """Return the number of tokens in the original graph."""
        return self.prefix + self.domain.whole_count + self.suffix

    def at(self, level: int) -> TokenAxis:
        """Return the same axis at another level."""
        return replace(self, domain=self.domain.at(level))

    def pairs_with(self, other: TokenAxis) -> bool:
        """Return whether both, whole, run over the same places index by index: one grid, or two of the same shape."""
        shapes = self.domain.grid.shape == other.domain.grid.shape
        return shapes and (self.prefix, self.suffix) == (other.prefix, other.suffix)


Factor = Plain | GridAxis | TokenAxis
Dim = tuple[Factor, ...]
TensorType = tuple[Dim, ...]
CountOf = Callable[[TokenDomain], int]
"""A function from a domain to its number of patch tokens in the plan; `whole_count` for the original graph."""


def whole_count(domain: TokenDomain) -> int:
    """Return the number of patches in the original graph, where nothing is removed: its `CountOf`."""
    return domain.whole_count


def plain(*sizes: int) -> TensorType:
    """Return the type of a tensor of these sizes, none of whose dimensions runs over tokens."""
    return tuple((Plain(size),) for size in sizes)


def whole_size(dim: Dim) -> int:
    """Return the size of `dim` in the original graph."""
    return math.prod(factor.whole_size for factor in dim)


def size(dim: Dim, count: CountOf) -> int:
    """Return the size of `dim` where each domain holds `count(domain)` patches."""
    return math.prod(f.prefix + count(f.domain) + f.suffix if isinstance(f, TokenAxis) else f.whole_size for f in dim)


def token_axis(dim: Dim) -> TokenAxis | None:
    """Return the token axis that `dim` *is*; None where it isn't one (a merged dimension isn't)."""
    return dim[0] if len(dim) == 1 and isinstance(dim[0], TokenAxis) else None


def holds_images(dim: Dim) -> bool:
    """Return whether the batch that a grid was born with is a factor of `dim`."""
    return any(isinstance(factor, Plain) and factor.images for factor in dim)


def images_in(tensor_type: TensorType) -> int:
    """Return how many images a type is known to hold, over all its dimensions; 1 where none is known to."""
    return math.prod(f.size for dim in tensor_type for f in dim if isinstance(f, Plain) and f.images)


def as_images(dim: Dim) -> Dim:
    """Return `dim`, each plain part of which is known to be images."""
    return tuple(replace(factor, images=True) if isinstance(factor, Plain) else factor for factor in dim)


def images_dims(tensor_type: TensorType, images: int) -> list[int]:
    """Return the dimensions that are the batch of `images`: those known to be, or, failing that, those of that size."""
    fitting = [d for d, dim in enumerate(tensor_type) if is_plain(dim) and whole_size(dim) == images]
    return [d for d in fitting if holds_images(tensor_type[d])] or fitting


def token_axes(tensor_type: TensorType) -> list[TokenAxis]:
    """Return every token axis in a type, including those inside merged dimensions."""
    return [factor for dim in tensor_type for factor in dim if isinstance(factor, TokenAxis)]


def is_plain(dim: Dim) -> bool:
    """Return whether nothing in `dim` runs over tokens or over a side of a grid."""
    return all(isinstance(factor, Plain) for factor in dim)


def product(factors: Sequence[Factor]) -> Dim:
    """Return the dimension that these factors make up, without factors of size one, which carry no information."""
    return tuple(merge_plain([factor for factor in factors if factor.whole_size != 1])) or (Plain(1),)


def _is_fixed(factor: Plain) -> bool:
    """Return whether a factor is never merged: images, and other sizes known only when the graph runs."""
    return factor.images or is_symbolic(factor.size)


def merge_plain(factors: Sequence[Factor]) -> list[Factor]:
    """Merge adjacent plain factors into one: 4·6 and 6·4 are the same."""
    merged: list[Factor] = []
    for factor in factors:
        last = merged[-1] if merged else None
        if isinstance(factor, Plain) and isinstance(last, Plain) and not (_is_fixed(factor) or _is_fixed(last)):
            merged[-1] = Plain(last.size * factor.size)
        else:
            merged.append(factor)
    return merged


def merge_grids(dim: Dim) -> Dim:
    """Join parts of a side, and replace each full row-major run of a grid's sides by the token axis that it is.

    This is where a domain is born: (GridAxis(g, 0), GridAxis(g, 1)) is the patch tokens of g. A dimension made of parts
    of two sides or more is the tokens of a region: of a window, or of one frame of a video. Where it holds anything
    else (images), its parts stay as they are.
    """
    merged: list[Factor] = []
    for factor in dim:
        last = merged[-1] if merged else None
        joined = last.joined(factor) if isinstance(last, GridAxis) and isinstance(factor, GridAxis) else None
        merged[-1:] = [joined] if joined is not None else [*merged[-1:], factor]
    # Adjacent parts are joined by now, so a run of whole sides is one axis.
    i = 0
    while i < len(merged):
        factor = merged[i]
        if isinstance(factor, GridAxis):
            sides = long_sides(factor.grid)
            if merged[i : i + len(sides)] == sides:
                merged[i : i + len(sides)] = [TokenAxis(TokenDomain(factor.grid))]
        i += 1
    return _region(tuple(merged))


def long_sides(grid: Grid) -> list[Factor]:
    """Return the sides of a grid that are longer than one patch, or all where none is: those that a row shows."""
    sides = [GridAxis(grid, side) for side in range(len(grid.shape))]
    return [side for side in sides if side.whole_size != 1] or list(sides)


def in_rows(kind: TensorType) -> TensorType:
    """Return the type with a token axis in the place of a side that is all of its grid, where features come after it.

    It is all of a series, and of a strip one patch high whose other side is gone. Before features, [B, L, C], it is a
    row of tokens; after them, [B, C, L], it may still be a map.
    """
    held = [f.grid for dim in kind for f in dim if isinstance(f, GridAxis)]

    def row(dim: Dim) -> Dim:
        (factor,) = dim if len(dim) == 1 else (None,)
        if not isinstance(factor, GridAxis) or held.count(factor.grid) != 1:
            return dim
        return merge_grids(dim) if long_sides(factor.grid) == [factor] else dim

    return (*map(row, kind[:-1]), *kind[-1:])


def _region(dim: Dim) -> Dim:
    """Return the token axis of a region where `dim` is parts of several sides of a grid, in any order; else `dim`."""
    parts = tuple(factor for factor in dim if isinstance(factor, GridAxis))
    if not parts or len(parts) != len(dim) or len({part.grid for part in parts}) > 1:
        return dim
    grid = parts[0].grid
    long = {side for side, size in enumerate(grid.shape) if size != 1}
    if len({part.side for part in parts} & long) < 2:
        return dim
    shape = tuple(part.whole_size for part in parts)
    strides = "x".join(f"{part.side}_{part.whole_size}by{part.stride}" for part in parts)
    rolled = "".join(f"_{by}" for by in grid.shift)
    return (TokenAxis(TokenDomain(Grid(f"{grid.birth}{rolled}_{strides}", shape, parts=parts))),)


def split_tokens(dim: Dim) -> Dim:
    """Undo `merge_grids` where a whole token axis without prefix can be seen as its grid again."""
    return tuple(part for factor in dim for part in _sides(factor))


def _sides(factor: Factor) -> Sequence[Factor]:
    """Return a factor as the sides of its grid, where it is a whole token axis of patches alone."""
    if not isinstance(factor, TokenAxis) or factor.prefix or factor.suffix or factor.domain.level:
        return [factor]
    grid = factor.domain.grid
    return grid.parts or [GridAxis(grid, side) for side in range(len(grid.shape))]
