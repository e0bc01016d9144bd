"""The protocol of a strategy: how it scores tokens, what becomes of removed ones, and what attention reads of them.

The passes decide where tokens are removed and how many. A strategy inserts its operators there, through an `Emit` that
places them. It also prices them, so that a budget includes the strategy's own work.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.targets.work import Work
from gtp_fx.types.axes import TokenAxis
from gtp_fx.types.grids import Grid


class Emit(Protocol):
    """Insert a call at the place being rewritten, and return its node."""

    def __call__(self, target: Any, *args: Any) -> fx.Node: ...


@dataclass(frozen=True)
class SiteShape:
    """The sizes of a site, for pricing.

    patches_in, patches_out: patches before and after the site; numbers, or arrays of candidates.
    others: tokens of the stream that are no patches.
    channels: features of a token.
    heads: heads of the block's attention.
    images: images of a run.
    dtype: the stream's dtype by torch's name of it.
    key_features: features of a key in one head.
    prefix: tokens before the patches.
    kernels: price the work of GTP's kernels where there are some, instead of the operators'.
    """

    patches_in: Any
    patches_out: Any
    others: int
    channels: int
    heads: int
    images: int = 1
    dtype: str = "float32"
    key_features: int = 1
    prefix: int = 0
    kernels: bool = False


@dataclass(frozen=True)
class Removal:
    """Record of one site's removal, as nodes.

    kept: [B, K] indices of the kept patches among those that the site had.
    removed: [B, P] indices of the removed patches among them.
    kept_index, removed_index: the same patches as indices into the whole grid.
    weights: [B, K, P] how much of each removed token each kept one received, to be multiplied by `alpha`; None where
        they received nothing.
    alpha: factor of `weights`.
    own: [B, K] factor of a kept token itself; 1 where None.
    of_whole: `kept` and `removed`, too, are indices into the whole grid.
    """

    kept: fx.Node
    removed: fx.Node
    kept_index: fx.Node
    removed_index: fx.Node
    weights: fx.Node | None
    alpha: float = 1.0
    own: fx.Node | None = None
    of_whole: bool = False


@dataclass(frozen=True)
class StreamState:
    """State that a strategy carries along one stream, as nodes; each level of the stream has its own.

    index: [B, n] positions of the remaining patches among all of the stream, ascending; None while all are there.
    scale: [B, n] how many original tokens each one stands for; None where the strategy doesn't track it.
    carried: whatever else the strategy needs at every site.
    removal: the site that led to this level; None at level 0.
    """

    index: fx.Node | None = None
    scale: fx.Node | None = None
    carried: tuple[fx.Node, ...] = ()
    removal: Removal | None = None


@dataclass(frozen=True)
class Attention:
    """The operands of a scaled dot-product attention node; `bias` and `scale` may be None.

    beside: how many keys come before and after those of the tokens: learned ones, memory.
    """

    q: fx.Node
    k: fx.Node
    v: fx.Node
    bias: fx.Node | None
    scale: float | None
    beside: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, node: fx.Node) -> Attention:
        """Return the operands of scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, *, scale)."""
        q, k, v, *rest = node.args
        bias = rest[0] if rest else node.kwargs.get("attn_mask")
        return cls(q, k, v, bias, node.kwargs.get("scale"))  # type: ignore[arg-type]

    def others(self) -> tuple[int, ...]:
        """Return `beside` as the operators take it: nothing where every key is a token's."""
        return self.beside if any(self.beside) else ()

    def of_tokens(self, emit: Emit, keys: fx.Node) -> fx.Node:
        """Return the tokens' part of keys or values [B, H, M, D]."""
        before, after = self.beside
        if not any(self.beside):
            return keys
        return emit(aten.slice.Tensor, keys, -2, before, -after if after else sys.maxsize)


@dataclass(frozen=True)
class AtSite:
    """A place where tokens are about to be removed.

    stream: [B, prefix + n + suffix, C].
    axis: the tokens of the stream's whole grid.
    count: n, the patches that the site has.
    removed: how many of them to remove.
    block: number of the attention block, from 0.
    scores: [B, n] scores of the patches by that block's attention; None where the strategy reads none.
    attention: operands of that attention; None where the site stands before it.
    """

    stream: fx.Node
    axis: TokenAxis
    count: int
    removed: int
    block: int
    scores: fx.Node | None
    attention: Attention | None


class Strategy(Protocol):
    """One way of shortening a stream: a value, equal to any other with the same fields."""

    def __hash__(self) -> int: ...

    @property
    def name(self) -> str: ...

    @property
    def code(self) -> str:
        """Return what distinguishes this strategy's code from another's of the same name, for caches of measurements.

        Empty where no user may write such a strategy.
        """

    @property
    def score(self) -> str:
        """Return what attention ranks tokens by at a site: a name in `gtp_fx.ops.attention.SCORES`, or "none"."""

    @property
    def before_attention(self) -> bool:
        """Return whether tokens are removed at a block's input, instead of after its attention."""

    @property
    def restores_tokens(self) -> bool:
        """Return whether removed tokens may be chosen again, and are back in place after the last block."""

    def positions(self, blocks: int) -> Collection[int]:
        """Return the blocks of a stream, counted from 0, at which tokens may be removed."""

    @property
    def needs_full_maps(self) -> bool:
        """Return whether the whole attention map decides something, so that no query is dead."""

    @property
    def rewrites_every_attention(self) -> bool:
        """Return whether attention differs from the original's even in blocks without a site."""

    @property
    def reads_scales(self) -> bool:
        """Return whether attention over a shortened stream reads how many tokens each key stands for."""

    def settled(self, streams: Sequence[tuple[Grid, Sequence[int]]]) -> Strategy:
        """Return the strategy with every "auto" decided by the plan.

        streams: for each stream, its grid and the number of tokens removed at each of its sites.
        """

    @property
    def weighted_pooling(self) -> bool:
        """Return whether average pooling weighs tokens by their scale."""

    @property
    def recovers_branches(self) -> bool:
        """Return whether a token that skips a branch gets its neighbours' results, instead of nothing."""

    @property
    def rests_windows(self) -> bool:
        """Return whether whole windows rest where they can, instead of tokens that skip a branch."""

    @property
    def recovers_updates(self) -> bool:
        """Return whether a removed token is recovered in its residual stream.

        There it is what it was plus the mean change of its neighbours. Otherwise it is its neighbours' mean.
        """

    def refuse(self, axis: TokenAxis, skipping: bool = False) -> str:
        """Return why this strategy can't work on such tokens; empty where it can.

        skipping: tokens are not removed; they only skip a branch.
        """

    def refuse_stream(self, stream: fx.Node, axis: TokenAxis) -> str:
        """Return why tokens can't be removed from the stream at a node, [B, prefix + G + suffix, C]; empty if they can.

        It depends on what the stream holds or is computed from; `refuse` knows its tokens' number and order alone.
        """

    def start(self, emit: Emit, stream: fx.Node, axis: TokenAxis, places: fx.Node | None) -> StreamState:
        """Insert what a stream needs at the input of its first block, [B, prefix + G + suffix, C]; return its state.

        places: [1 or B, G, R], coordinates of the patches on `gtp_fx.types.places.home_of` their grid; None where they
            are in its order.
        """

    def attend(self, emit: Emit, attention: Attention, axis: TokenAxis, scored: bool) -> tuple[fx.Node, fx.Node]:
        """Replace self-attention; return its output and the patches' scores, [B, n], or [B, 0] unless `scored`."""

    def attend_cells(
        self, emit: Emit, attention: Attention, grid: Sequence[int], cells: Sequence[int]
    ) -> tuple[fx.Node, fx.Node]:
        """Replace attention whose keys are cells of the patches' grid; return its output and the scores [B, n]."""

    def reduce(self, emit: Emit, site: AtSite, state: StreamState) -> tuple[fx.Node, StreamState]:
        """Remove tokens at a site; return the shorter stream and its state."""

    def put_back(self, emit: Emit, stream: fx.Node, state: StreamState, axis: TokenAxis) -> fx.Node:
        """Return the stream with every token in its place after the last block, where the strategy `returns` tokens."""

    def variants(self) -> Sequence[Strategy]:
        """Return the same strategy with other numbers or another score: what calibration may choose among."""

    def start_works(self, grid: Sequence[int], channels: int, images: int, dtype: str, kernels: bool) -> list[Work]:
        """Price `start`.

        kernels: as in `SiteShape`.
        """

    def scoring_works(self, heads: int, queries: Any, keys: Any, images: int, dtype: str) -> list[Work]:
        """Price what scoring adds to one attention."""

    def site_works(self, site: SiteShape, scales_read: bool) -> list[Work]:
        """Price a site: `reduce`, and what scoring adds to the attention.

        scales_read: a later attention reads the token scales.
        """


def unknown_prefix(score: str) -> str:
    """Return the refusal of a score that reads CLS, where nothing shows whether there is one."""
    return (
        f"score={score!r} reads the CLS token's attention, and tokens that come in as an argument don't show whether "
        f"there is one: prefix_tokens=1 says so, and score='broadcast-mean' reads that of all tokens"
    )
