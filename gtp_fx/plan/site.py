"""Sites: places where tokens may be removed, or may skip a branch, with the sizes that pricing needs."""

from __future__ import annotations

from dataclasses import dataclass

from gtp_fx.types.axes import TokenAxis, TokenDomain


@dataclass(frozen=True)
class Site:
    """A place where tokens may be removed from their stream or may skip a branch, or where whole windows may rest.

    block: number of the attention block, from 0.
    axis: the tokens before the site, at the level they are removed from; for a branch, those of one window.
    channels: features of a token in the residual stream.
    heads: attention heads.
    images: images in one run of the graph, symbols as primes (see `gtp_fx.graph.symbols`).
    branch: the cost of the branch that tokens skip, or of the block in which windows rest; None where tokens are
        removed.
    dtype: dtype of the stream, as torch names it.
    depth: the share of the model's attention blocks that come before this one, in [0, 1).
    patches_read: whether patches are read after the last block (pooled, returned), not only prefix tokens.
    key_features: features of one key of one head.
    """

    block: int
    axis: TokenAxis
    channels: int
    heads: int
    images: int = 1
    branch: BranchCost | RestCost | None = None
    dtype: str = "float32"
    depth: float = 0.0
    patches_read: bool = True
    key_features: int = 1

    @property
    def domain(self) -> TokenDomain:
        """The patch tokens before the site."""
        return self.axis.domain

    @property
    def others(self) -> int:
        """The number of tokens that are not patches (prefix and suffix); they are never removed."""
        return self.axis.prefix + self.axis.suffix

    @property
    def stream(self) -> object:
        """Key of what shrinks from site to site: the grid of a stream, or the block number of a branch."""
        return self.domain.grid if self.branch is None else self.block

    @property
    def whole(self) -> int:
        """The number of patches before any is removed; for a branch, the tokens of each window, or the windows."""
        return self.domain.whole_count if self.branch is None else self.branch.tokens


@dataclass(frozen=True)
class BranchCost:
    """FLOPs of a branch, for one run of the graph.

    whole: FLOPs where every token goes through it.
    per_token: FLOPs for one token.
    images: images in one run; 1 where the batch is symbolic.
    windows: windows of one image.
    tokens: patches of one window.
    others: tokens of one image that go through the branch, whichever patches skip it.
    features: features of the branch's result.
    recovered: features of all its results that skipped tokens get from their neighbours; 0 where they get nothing.
    scoring: FLOPs that ranking the tokens adds to this block's own attention.
    by_activity: whether tokens skip by how far they are from their window's mean, so that attention needn't score them.
    """

    whole: int
    per_token: int
    images: int
    windows: int
    tokens: int
    others: int
    features: int
    recovered: int
    scoring: int
    by_activity: bool = False

    def change(self, skipping: int) -> int:
        """Return the change in FLOPs when `skipping` tokens of each window skip the branch; negative where that saves.

        The last product recovers the skipped tokens' results from those of the tokens kept.
        """
        if not skipping:
            return 0
        kept = self.tokens - skipping
        windows = self.images * self.windows
        through = windows * kept + self.images * self.others
        recovering = 2 * windows * kept * skipping * self.recovered
        return through * self.per_token - self.whole + recovering + self.scoring


@dataclass(frozen=True)
class RestCost:
    """FLOPs of a block in which whole windows may rest, for one run of the graph.

    each: FLOPs of one of an image's windows.
    cells: FLOPs of the cells of one that rests.
    tokens: windows of one image that can rest: what a schedule counts at such a site.
    images: images in one run; 1 where the batch is symbolic.
    patches: patches of one window.
    features: features of the stream.
    """

    each: int
    cells: int
    tokens: int
    images: int
    patches: int
    features: int

    def change(self, resting: int) -> int:
        """Return the change in FLOPs when `resting` windows of each image rest; choosing them counts nothing."""
        return -self.images * (self.each - self.cells) * resting
