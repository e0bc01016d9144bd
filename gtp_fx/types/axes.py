"""Token axes: the type of a tensor says, for each of its dimensions, which tokens it runs over.

The nouns, from small to large:

    Grid         the patch grid that a convolution makes, e.g. 14x14, known by the node that made it; or one made of it:
                 rolled, padded, or a region (a window) of it
    TokenDomain  the patch tokens of one grid that are still in the stream: level 0 is all of them, level k is what
                 the k-th propagation site left
    Factor       what a dimension is made of: Plain (channels, heads, batch), GridAxis (one side of a grid, or a part of
                 one: which window, or where in it), or TokenAxis (prefix tokens, then the patches of a domain, then
                 suffix tokens)
    Dim          a product of factors, outermost first: the 1576 of a [B*N, C] tensor is (Plain(8), TokenAxis(...))
    TensorType   one Dim per dimension

A type knows the *original* size of each of its factors, so a shape in the graph can be matched against it, and it
knows the domain, so the size that the shape must have after tokens have left can be computed instead of guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from gtp_fx.graph.symbols import is_symbolic


@dataclass(frozen=True)
class Grid:
    """A patch grid: `birth` is the name of the node that made it, `shape` its sides, row-major (any rank).

    shift: by how much each side was rolled, () where none was. inside: of a padded grid, the one that its leading rows and
    columns are. parts: of a region, its sides as parts of another grid's; regions of all places are one Grid, as the
    windows of a shifted-window transformer are alike.
    """

    birth: str
    shape: tuple[int, ...]
    shift: tuple[int, ...] = ()
    inside: Grid | None = None
    parts: tuple[GridAxis, ...] = ()

    def rolled(self, by: Sequence[int]) -> Grid:
        """The same patches, those at i now at i + by; rolled back, it is the grid that it was."""
        before = self.shift or (0,) * len(self.shape)
        shift = tuple((a + b) % size for a, b, size in zip(before, by, self.shape, strict=True))
        return replace(self, shift=shift if any(shift) else ())

    def resized(self, side: int, size: int) -> Grid:
        """Of a padded grid, with one side cut shorter; cut to what is inside on every side, it is that."""
        shape = (*self.shape[:side], size, *self.shape[side + 1 :])
        return self.inside if self.inside is not None and shape == self.inside.shape else replace(self, shape=shape)


@dataclass(frozen=True)
class TokenDomain:
    """The patch tokens of `grid` that `level` propagation sites have left in the stream."""

    grid: Grid
    level: int = 0

    @property
    def whole_count(self) -> int:
        """Patch tokens at level 0, before any left."""
        return math.prod(self.grid.shape)

    def at(self, level: int) -> TokenDomain:
        return replace(self, level=level)


@dataclass(frozen=True)
class Plain:
    """A dimension, or a part of one, that doesn't run over tokens. A symbolic size is held as a prime (see `sizes`).

    images: it is known to be the batch that a grid was born with, so that no other size like it is taken for that.
    """

    size: int
    images: bool = field(default=False, compare=False)

    @property
    def whole_size(self) -> int:
        return self.size


@dataclass(frozen=True)
class GridAxis:
    """Side number `side` of a patch grid that has not been flattened yet, or a part of it: `count` places, `stride` apart.

    A side of 56 in windows of 7 is which window, 8 places 7 apart, and where in it, 7 places 1 apart. count 0: the whole side.
    """

    grid: Grid
    side: int
    count: int = 0
    stride: int = 1

    @property
    def whole_size(self) -> int:
        return self.count or self.grid.shape[self.side]

    def split(self, outer: int) -> tuple[GridAxis, GridAxis]:
        """As `outer` places far apart and what is between them; `outer` divides the size."""
        inner = self.whole_size // outer
        far = replace(self, count=outer, stride=self.stride * inner)
        return far.canonical(), replace(self, count=inner).canonical()

    def canonical(self) -> GridAxis:
        """All places of a side, one apart, are the side."""
        whole = self.count == self.grid.shape[self.side] and self.stride == 1
        return replace(self, count=0) if whole else self

    def joined(self, inner: GridAxis) -> GridAxis | None:
        """This part and one further in as one, where they are parts of one side that follow each other."""
        same = (self.grid, self.side) == (inner.grid, inner.side)
        if not same or self.stride != inner.stride * inner.whole_size:
            return None
        return replace(inner, count=self.whole_size * inner.whole_size).canonical()


@dataclass(frozen=True)
class TokenAxis:
    """`prefix` tokens that never leave (CLS, registers), the patches of `domain`, `suffix` tokens that never leave."""

    domain: TokenDomain
    prefix: int = 0
    suffix: int = 0

    @property
    def whole_size(self) -> int:
        return self.prefix + self.domain.whole_count + self.suffix

    def at(self, level: int) -> TokenAxis:
        return replace(self, domain=self.domain.at(level))

    def pairs_with(self, other: TokenAxis) -> bool:
        """True where the two, whole, run over the same places index by index: one grid, or two of the same shape."""
        shapes = self.domain.grid.shape == other.domain.grid.shape
        return shapes and (self.prefix, self.suffix) == (other.prefix, other.suffix)


Factor = Plain | GridAxis | TokenAxis
Dim = tuple[Factor, ...]
TensorType = tuple[Dim, ...]
CountOf = Callable[[TokenDomain], int]
"""Patch tokens in a domain, as the plan has them; `whole_count` for the original graph."""


def whole_count(domain: TokenDomain) -> int:
    """The `CountOf` of the original graph: nothing has left."""
    return domain.whole_count


def plain(*sizes: int) -> TensorType:
    """The type of a tensor that no dimension of which runs over tokens."""
    return tuple((Plain(size),) for size in sizes)


def whole_size(dim: Dim) -> int:
    """The size of `dim` in the original graph."""
    return math.prod(factor.whole_size for factor in dim)


def size(dim: Dim, count: CountOf) -> int:
    """The size of `dim` when each domain holds `count(domain)` patches."""
    return math.prod(f.prefix + count(f.domain) + f.suffix if isinstance(f, TokenAxis) else f.whole_size for f in dim)


def token_axis(dim: Dim) -> TokenAxis | None:
    """The token axis that `dim` *is*, or None where it isn't one (a merged dimension is not one)."""
    return dim[0] if len(dim) == 1 and isinstance(dim[0], TokenAxis) else None


def holds_images(dim: Dim) -> bool:
    """True where the batch that a grid was born with is a factor of `dim`."""
    return any(isinstance(factor, Plain) and factor.images for factor in dim)


def images_dims(tensor_type: TensorType, images: int) -> list[int]:
    """The dimensions that are the batch of `images`: known to be, or, where none is known, as long."""
    fitting = [d for d, dim in enumerate(tensor_type) if is_plain(dim) and whole_size(dim) == images]
    return [d for d in fitting if holds_images(tensor_type[d])] or fitting


def token_axes(tensor_type: TensorType) -> list[TokenAxis]:
    """Every token axis in a type, those inside merged dimensions too."""
    return [factor for dim in tensor_type for factor in dim if isinstance(factor, TokenAxis)]


def is_plain(dim: Dim) -> bool:
    """True where nothing in `dim` runs over tokens or over a side of a grid."""
    return all(isinstance(factor, Plain) for factor in dim)


def product(factors: Sequence[Factor]) -> Dim:
    """The dimension that these factors make up; factors of size one say nothing and are left out."""
    return tuple(merge_plain([factor for factor in factors if factor.whole_size != 1])) or (Plain(1),)


def _stays_apart(factor: Plain) -> bool:
    """Images, and other sizes that only a run tells."""
    return factor.images or is_symbolic(factor.size)


def merge_plain(factors: Sequence[Factor]) -> list[Factor]:
    """Plain factors beside each other as one: 4·6 is 6·4."""
    merged: list[Factor] = []
    for factor in factors:
        last = merged[-1] if merged else None
        if isinstance(factor, Plain) and isinstance(last, Plain) and not (_stays_apart(factor) or _stays_apart(last)):
            merged[-1] = Plain(last.size * factor.size)
        else:
            merged.append(factor)
    return merged


def merge_grids(dim: Dim) -> Dim:
    """`dim` with parts of a side joined, and each full row-major run of one grid's sides replaced by the token axis it is.

    This is where a domain is born: (GridAxis(g, 0), GridAxis(g, 1)) is the patch tokens of g. A dimension that is parts of
    every side is the tokens of a region; beside anything else (images) its parts stay as they are.
    """
    merged: list[Factor] = []
    for factor in dim:
        last = merged[-1] if merged else None
        joined = last.joined(factor) if isinstance(last, GridAxis) and isinstance(factor, GridAxis) else None
        merged[-1:] = [joined] if joined is not None else [*merged[-1:], factor]
    i = 0
    while i < len(merged):
        factor = merged[i]
        if isinstance(factor, GridAxis):
            sides = [GridAxis(factor.grid, side) for side in range(len(factor.grid.shape))]
            if merged[i : i + len(sides)] == sides:
                merged[i : i + len(sides)] = [TokenAxis(TokenDomain(factor.grid))]
        i += 1
    return _region(tuple(merged))


def _region(dim: Dim) -> Dim:
    """The token axis of a region, where `dim` is parts of every side of a grid, in whatever order they are."""
    parts = tuple(factor for factor in dim if isinstance(factor, GridAxis))
    if not parts or len(parts) != len(dim) or len({part.grid for part in parts}) > 1:
        return dim
    grid = parts[0].grid
    if {part.side for part in parts} != set(range(len(grid.shape))) or len(grid.shape) < 2:
        return dim
    shape = tuple(part.whole_size for part in parts)
    strides = "x".join(f"{part.side}_{part.whole_size}by{part.stride}" for part in parts)
    rolled = "".join(f"_{by}" for by in grid.shift)
    return (TokenAxis(TokenDomain(Grid(f"{grid.birth}{rolled}_{strides}", shape, parts=parts))),)


def split_tokens(dim: Dim) -> Dim:
    """The inverse of `merge_grids`, where a whole token axis without prefix can be seen as its grid again."""
    return tuple(part for factor in dim for part in _sides(factor))


def _sides(factor: Factor) -> Sequence[Factor]:
    if not isinstance(factor, TokenAxis) or factor.prefix or factor.suffix or factor.domain.level:
        return [factor]
    grid = factor.domain.grid
    return grid.parts or [GridAxis(grid, side) for side in range(len(grid.shape))]
