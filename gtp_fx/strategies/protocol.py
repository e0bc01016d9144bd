"""The protocol of a strategy: how it scores tokens, what becomes of removed ones, and what attention reads of them.

The passes decide where tokens are removed and how many. A strategy inserts its operators there, through an `Emit` that
places them. It also prices them, so that a budget includes the strategy's own work.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

from torch import fx

from gtp_fx.strategies.sites import AtSite, Attention, Emit, SiteShape, StreamState
from gtp_fx.targets.work import Work
from gtp_fx.types.axes import TokenAxis
from gtp_fx.types.grids import Grid


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
    def shortens_queries(self) -> bool:
        """Return whether keys and values of a block are computed before its tokens are removed, and queries after that.

        Sites are then at the inputs of blocks.
        """

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
        """Return whether a token that skips a branch gets its neighbours' results."""

    @property
    def branch_mean(self) -> float:
        """Return the share of its window's mean result that a token gets which skips a branch, in [0, 1].

        0: it gets nothing. Read where it doesn't get its neighbours' results (`recovers_branches`).
        """

    @property
    def rests_windows(self) -> bool:
        """Return whether whole windows rest where they can, instead of tokens that skip a branch."""

    @property
    def rest_share(self) -> float:
        """Return what a token of a window that rests gets of its cell's change, in [0, 1]; 0 for nothing."""

    @property
    def rest_keys(self) -> str:
        """Return what the cells of a window that rests attend to: "cells", or all of the window's "patches"."""

    @property
    def skips_branches(self) -> bool:
        """Return whether tokens may skip a branch where a grid has to stay whole."""

    @property
    def recovers_updates(self) -> bool:
        """Return whether a removed token is recovered in its residual stream.

        There it is what it was plus the mean change of its neighbours. Otherwise it is its neighbours' mean.
        """

    @property
    def recovers_by_attention(self) -> bool:
        """Return whether that mean is by the attention that a removed token pays what its site left.

        It is that of the block where the site stands, at whose input queries have to be apart from keys and values
        (`shortens_queries`). Otherwise the mean is over those that received the token.
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
