"""Token axes: the type of a tensor says, for each of its dimensions, which tokens it runs over.

The nouns, from small to large:

    Grid         the patch grid that a convolution makes, e.g. 14x14, known by the node that made it
    TokenDomain  the patch tokens of one grid that are still in the stream: level 0 is all of them, level k is what
                 the k-th propagation site left
    Factor       what a dimension is made of: Plain (channels, heads, batch), GridAxis (one side of a grid), or
                 TokenAxis (prefix tokens, then the patches of a domain, then suffix tokens)
    Dim          a product of factors, outermost first: the 1576 of a [B*N, C] tensor is (Plain(8), TokenAxis(...))
    TensorType   one Dim per dimension

A type knows the *original* size of each of its factors, so a shape in the graph can be matched against it, and it
knows the domain, so the size that the shape must have after tokens have left can be computed instead of guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Grid:
    """A patch grid: `birth` is the name of the node that made it, `shape` its sides, row-major (any rank)."""

    birth: str
    shape: tuple[int, ...]


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
    """Side number `side` of a patch grid that has not been flattened yet."""

    grid: Grid
    side: int

    @property
    def whole_size(self) -> int:
        return self.grid.shape[self.side]


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


def merge_plain(factors: Sequence[Factor]) -> list[Factor]:
    """Plain factors beside each other as one: 4·6 is 6·4. Images stay apart."""
    merged: list[Factor] = []
    for factor in factors:
        last = merged[-1] if merged else None
        if isinstance(factor, Plain) and isinstance(last, Plain) and not (factor.images or last.images):
            merged[-1] = Plain(last.size * factor.size)
        else:
            merged.append(factor)
    return merged


def merge_grids(dim: Dim) -> Dim:
    """`dim` with each full row-major run of one grid's sides replaced by the token axis that it is.

    This is where a domain is born: (GridAxis(g, 0), GridAxis(g, 1)) is the patch tokens of g.
    """
    merged: list[Factor] = []
    i = 0
    while i < len(dim):
        factor = dim[i]
        if isinstance(factor, GridAxis):
            run = tuple(GridAxis(factor.grid, side) for side in range(len(factor.grid.shape)))
            if dim[i : i + len(run)] == run:
                merged.append(TokenAxis(TokenDomain(factor.grid)))
                i += len(run)
                continue
        merged.append(factor)
        i += 1
    return tuple(merged)


def split_tokens(dim: Dim) -> Dim:
    """The inverse of `merge_grids`, where a whole token axis without prefix can be seen as its grid again."""
    return tuple(
        part
        for factor in dim
        for part in (
            [GridAxis(factor.domain.grid, side) for side in range(len(factor.domain.grid.shape))]
            if isinstance(factor, TokenAxis) and not (factor.prefix or factor.suffix or factor.domain.level)
            else [factor]
        )
    )
