"""What a strategy is: how it scores tokens, what it does with those that leave, what it tells attention.

The passes decide where and how many; a strategy inserts its operators there, through an `Emit` that places them. It
also prices them, so that a budget holds with the strategy's own work counted.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import fx

from gtp_fx.targets.work import Work
from gtp_fx.types.axes import TokenAxis


class Emit(Protocol):
    """Insert a call at the place being rewritten, and return its node."""

    def __call__(self, target: Any, *args: Any) -> fx.Node: ...


@dataclass(frozen=True)
class SiteShape:
    """A site's sizes for pricing: patches in and out (numbers, or arrays of candidates), tokens that are none, channels,
    heads and features of a key; images of a run, the stream's dtype as torch names it; prefix: tokens before the patches.
    kernels: the work as GTP's kernels do it, where there are some; else as the operators do."""

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
    """What one site did, as nodes.

    kept [B, K], propagated [B, P]: indices into the patches that the site had. kept_index, propagated_index: the same into
    the whole grid. weights [B, K, P]: how much of each propagated token went to each kept one, times `alpha`; None where
    nothing did. own [B, K]: what of itself a kept one kept; all where None. of_whole: kept and propagated are into the whole grid.
    """

    kept: fx.Node
    propagated: fx.Node
    kept_index: fx.Node
    propagated_index: fx.Node
    weights: fx.Node | None
    alpha: float = 1.0
    own: fx.Node | None = None
    of_whole: bool = False


@dataclass(frozen=True)
class StreamState:
    """What a strategy carries along one stream, as nodes; one state for each level of it.

    index: [B, n] where on the whole grid the remaining patches stand, ascending; None while all are there.
    scale: [B, n] how many original tokens each stands for; None where the strategy doesn't say.
    carried: whatever else it needs at every site.
    removal: the site that led to this level; None at level 0.
    """

    index: fx.Node | None = None
    scale: fx.Node | None = None
    carried: tuple[fx.Node, ...] = ()
    removal: Removal | None = None


@dataclass(frozen=True)
class Attention:
    """The operands of a scaled dot-product attention node; bias and scale may be None."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    bias: fx.Node | None
    scale: float | None

    @classmethod
    def of(cls, node: fx.Node) -> Attention:
        """The operands of aten.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, *, scale)."""
        q, k, v, *rest = node.args
        bias = rest[0] if rest else node.kwargs.get("attn_mask")
        return cls(q, k, v, bias, node.kwargs.get("scale"))  # type: ignore[arg-type]


@dataclass(frozen=True)
class AtSite:
    """Where tokens are about to leave.

    stream [B, prefix + n + suffix, C]. axis: the tokens of its whole grid. leaving: how many of the n patches. block: the
    attention block's number, from 0. scores [B, n]: by that block's attention, None where it wasn't asked. attention: its
    operands; None where the site stands before it. count: n.
    """

    stream: fx.Node
    axis: TokenAxis
    count: int
    leaving: int
    block: int
    scores: fx.Node | None
    attention: Attention | None


class Strategy(Protocol):
    """One way of shortening a stream."""

    @property
    def name(self) -> str: ...

    @property
    def code(self) -> str:
        """What tells this strategy's code from another's of the same name, where a user may write it: for what caches measure."""

    @property
    def score(self) -> str:
        """What attention ranks tokens by at a site, a name in `gtp_fx.ops.attention.SCORES`; "none" where it needn't."""

    @property
    def before_attention(self) -> bool:
        """True where tokens leave at a block's input; else behind its attention."""

    @property
    def restores_tokens(self) -> bool:
        """True where tokens that left may be chosen again, and are back in their places behind the last block."""

    def positions(self, blocks: int) -> Collection[int]:
        """At which of a stream's blocks, counted from 0, tokens may leave."""

    @property
    def needs_full_maps(self) -> bool:
        """True where the whole attention map decides something, so that no query is dead."""

    @property
    def rewrites_every_attention(self) -> bool:
        """True where attention differs from the original's even in blocks without a site."""

    @property
    def reads_scales(self) -> bool:
        """True where attention over a shortened stream is told how many tokens each key stands for."""

    def settled(self, streams: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Strategy:
        """The same strategy with what the plan decides decided, once it is known: of each stream its grid and the counts that leave."""

    @property
    def weighted_pooling(self) -> bool:
        """True where average pooling weighs tokens by their scale."""

    @property
    def recovers_branches(self) -> bool:
        """True where a token that skips a branch gets its neighbours' results; else it gets none."""

    @property
    def recovers_updates(self) -> bool:
        """True where a token that left is recovered in its residual stream, as what it was plus what its neighbours became; else as
        the mean of those."""

    def refuse(self, axis: TokenAxis, skipping: bool = False) -> str:
        """Why this strategy can't work on such tokens; empty where it can. skipping: they only skip a branch."""

    def start(self, emit: Emit, stream: fx.Node, axis: TokenAxis) -> StreamState:
        """At the input of a stream's first block: stream [B, prefix + G + suffix, C]."""

    def attend(self, emit: Emit, attention: Attention, axis: TokenAxis, scored: bool) -> tuple[fx.Node, fx.Node]:
        """Replace self-attention: its output, and the scores [B, n] of the patch tokens ([B, 0] unless `scored`)."""

    def attend_cells(
        self, emit: Emit, attention: Attention, grid: Sequence[int], cells: Sequence[int]
    ) -> tuple[fx.Node, fx.Node]:
        """Replace attention whose keys are cells of the patches' grid: its output, and the scores [B, n] of the patches."""

    def reduce(self, emit: Emit, site: AtSite, state: StreamState) -> tuple[fx.Node, StreamState]:
        """At a site: the shorter stream and its state."""

    def put_back(self, emit: Emit, stream: fx.Node, state: StreamState, axis: TokenAxis) -> fx.Node:
        """Behind the last block, where the strategy `returns` tokens: the stream with every token in its place."""

    def variants(self) -> Sequence[Strategy]:
        """The same strategy with other numbers or another score: what calibration may choose among."""

    def start_works(self, grid: Sequence[int], channels: int, images: int, dtype: str, kernels: bool) -> list[Work]:
        """The work of `start`. kernels: as `SiteShape` has it."""

    def scoring_works(self, heads: int, queries: Any, keys: Any, images: int, dtype: str) -> list[Work]:
        """What scoring adds to one attention."""

    def site_works(self, site: SiteShape, told: bool) -> list[Work]:
        """The work of a site where tokens leave: `reduce`, and what scoring adds to the attention.

        told: a later attention reads the token scales.
        """
