"""Token axes: the type of a tensor says, for each of its dimensions, which tokens it runs over.

The nouns, from small to large:

    Grid         a patch grid that a convolution makes, e.g. 14x14, known by the node that made it; or a grid derived
                 from one: rolled, padded, or a region (a window) of it (`gtp_fx.types.grids`)
    TokenDomain  the patch tokens of one grid that remain in the stream: all of them at level 0; at level k, those
                 that remain after the k-th propagation site
    Factor       what a dimension is made of: Plain (channels, heads, batch), GridAxis (one side of a grid, or a part
                 of one: which window, or where in it), or TokenAxis (prefix tokens, then the patches of a domain,
                 then suffix tokens)
    Dim          a product of factors, outermost first: the 1576 of a [B*N, C] tensor is (Plain(8), TokenAxis(...))
    TensorType   one Dim for each dimension

A type knows the *original* size of each of its factors, so a shape in the graph can be matched against it. It also
knows the domain, so the size that a shape must have after tokens are removed is computed instead of guessed. Which
dimensions a reshape makes is in `gtp_fx.types.merging`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from gtp_fx.types.grids import Grid, GridAxis


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
Counts = Callable[[TokenDomain], Any]
"""Return the number of patches in a domain: an int, or an array of candidate counts."""

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
