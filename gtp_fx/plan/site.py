"""Places where tokens may leave, or skip a branch, as pricing sees them."""

from __future__ import annotations

from dataclasses import dataclass

from gtp_fx.types.axes import TokenAxis, TokenDomain


@dataclass(frozen=True)
class Site:
    """A place where tokens may leave: block number, the tokens of its stream, channels and heads.

    axis: at the level that they leave from; of a branch, a window's.
    images: how many images one run of the graph takes; 1 where the batch is symbolic, and priced as one.
    branch: where tokens don't leave but skip a branch of the block, what that costs.
    dtype: of the stream, as torch names it.
    key_features: of one key of one head.
    patches_read: whether what follows the last block reads the patches (pooled, returned) and not prefix tokens alone.
    depth: the share of the model's attention blocks that lie before this one, in [0, 1).
    """

    block: int
    axis: TokenAxis
    channels: int
    heads: int
    images: int = 1
    branch: BranchCost | None = None
    dtype: str = "float32"
    depth: float = 0.0
    patches_read: bool = True
    key_features: int = 1

    @property
    def domain(self) -> TokenDomain:
        """The patches that tokens leave from."""
        return self.axis.domain

    @property
    def others(self) -> int:
        """Tokens that are no patches and never leave."""
        return self.axis.prefix + self.axis.suffix

    @property
    def stream(self) -> object:
        """What shrinks from site to site: the tokens of a grid, or those of one branch alone."""
        return self.domain.grid if self.branch is None else self.block

    @property
    def whole(self) -> int:
        """Patches before any left; of a branch, the tokens of each window."""
        return self.domain.whole_count if self.branch is None else self.branch.tokens


@dataclass(frozen=True)
class BranchCost:
    """FLOPs of a branch, of one run of the graph.

    whole: with every token. per_token: of one. images: of one run; 1 where the batch is symbolic. windows, tokens: of an image,
    and in each. features: of its result. scoring: what ranking the tokens by this block's own attention adds to it.
    """

    whole: int
    per_token: int
    images: int
    windows: int
    tokens: int
    features: int
    scoring: int

    def change(self, skipping: int) -> int:
        """What is spent more when `skipping` tokens of each window go around it (less is negative)."""
        if not skipping:
            return 0
        kept = self.tokens - skipping
        rows = self.images * self.windows * kept
        return rows * self.per_token - self.whole + 2 * rows * skipping * self.features + self.scoring
