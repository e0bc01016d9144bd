"""GTP, graph-based token propagation (arXiv 2311.03035): removed tokens pass their features on to their neighbours."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import fx
from torch.ops import aten, gtp_fx  # type: ignore[import-not-found]

from gtp_fx.ops.token_graph import GRAPHS
from gtp_fx.strategies.gtp_options import check_options
from gtp_fx.strategies.gtp_work import graph_works, propagation_works
from gtp_fx.strategies.plain_numbers import take_plain_numbers
from gtp_fx.strategies.pricing import scoring_works
from gtp_fx.strategies.protocol import unknown_prefix
from gtp_fx.strategies.sites import AtSite, Attention, Emit, Removal, SiteShape, StreamState
from gtp_fx.strategies.token_scale import AUTO, SCALES_READ_FROM, log_scale_bound
from gtp_fx.targets.work import Work
from gtp_fx.types.axes import TokenAxis
from gtp_fx.types.grids import Grid
from gtp_fx.types.places import home_of


@dataclass(frozen=True)
class GTP:
    """The paper's method and its options.

    `branch` and `recovery` go beyond the paper, which neither skips branches nor returns removed tokens.

    score: how tokens are ranked, a name in `gtp_fx.ops.attention.SCORES`.
    graph: which tokens receive from which, a name in `gtp_fx.ops.token_graph.GRAPHS`; "mixed" is "semantic" where
        tokens have no places on a grid, as those that come in as an argument.
    neighbors: M, the semantic neighbours of a token.
    alpha: the share of a propagated token that is passed on.
    token_scale: adds the log token scale of a key to attention's logits; "auto" does so where the plan's counts let it
        make a difference (`gtp_fx.strategies.token_scale`), which with alpha = 0.1 they never do.
    attention_sparsity: theta in (0, 1]; below 1 the smallest entries of every attention map are dropped, which saves no
        FLOPs and needs the map in memory.
    weighted_pooling: average pooling weighs a token by its scale, whatever attention reads; the paper takes the plain
        mean.
    branch: result for tokens that skip a block's branch, where they can't be removed (windows, maps); "idle" gives them
        nothing, so they stay what they were; "recover" gives them their neighbours' results along the spatial graph.
    recovery: how removed tokens come back where the model returns or reads every patch; "update" adds to the token, as
        it was when removed, what has changed since in those that received it; "mean" takes the mean of those
        themselves.
    """

    score: str = "mixed-max"
    graph: str = "mixed"
    neighbors: int = 8
    alpha: float = 0.1
    token_scale: bool | str = AUTO
    attention_sparsity: float = 1.0
    weighted_pooling: bool = False
    branch: str = "idle"
    recovery: str = "update"

    name: ClassVar[str] = "gtp"
    code: ClassVar[str] = ""
    before_attention: ClassVar[bool] = False
    shortens_queries: ClassVar[bool] = False
    recovers_by_attention: ClassVar[bool] = False
    skips_branches: ClassVar[bool] = True
    rest_keys: ClassVar[str] = "cells"
    restores_tokens: ClassVar[bool] = False

    def __post_init__(self) -> None:
        take_plain_numbers(self)
        check_options(**vars(self))

    @classmethod
    def paper(cls, alpha: float = 0.1, attention_sparsity: float = 1.0) -> GTP:
        """Return the method as published, whatever the defaults here are.

        For the published schedule, pass schedule="uniform" too.

        alpha, attention_sparsity: the publication tunes both for each model and count.
        """
        return cls(
            score="mixed-max",
            graph="mixed",
            neighbors=8,
            alpha=alpha,
            token_scale=True,
            attention_sparsity=attention_sparsity,
            weighted_pooling=False,
        )

    @property
    def recovers_branches(self) -> bool:
        return self.branch == "recover"

    @property
    def branch_mean(self) -> float:
        return 0.0

    @property
    def rests_windows(self) -> bool:
        return False

    @property
    def rest_share(self) -> float:
        return 0.0

    @property
    def recovers_updates(self) -> bool:
        return self.recovery == "update"

    @property
    def needs_full_maps(self) -> bool:
        return self.attention_sparsity < 1.0

    @property
    def rewrites_every_attention(self) -> bool:
        return self.attention_sparsity < 1.0

    @property
    def reads_scales(self) -> bool:
        """Return whether attention reads token scales; also True while "auto" isn't settled.

        So the price before a plan is known is never too low.
        """
        return self.token_scale is not False

    def settled(self, streams: Sequence[tuple[Grid, Sequence[int]]]) -> GTP:
        if self.token_scale != AUTO:
            return self
        most = max(
            (
                log_scale_bound(home_of(grid).sides, self.graph, self.neighbors, self.alpha, counts, bool(grid.picked))
                for grid, counts in streams
            ),
            default=0,
        )
        return replace(self, token_scale=most > SCALES_READ_FROM)

    def positions(self, blocks: int) -> range:
        return range(blocks)

    def put_back(self, emit: Emit, stream: fx.Node, state: StreamState, axis: TokenAxis) -> fx.Node:
        raise AssertionError("tokens that GTP propagates don't return")

    def refuse(self, axis: TokenAxis, skipping: bool = False) -> str:
        patches, grid = axis.domain.whole_count, axis.domain.grid
        if not home_of(grid).placed and self.graph == "spatial":
            return (
                "graph='spatial' joins neighbours on a grid, and these tokens have none (they come in as an argument, "
                "or aren't known to be of one): graph='semantic' joins similar ones"
            )
        if self.score.startswith("cls") and grid.guarded:
            return unknown_prefix(self.score)
        if self.score.startswith("cls") and axis.prefix == 0:
            return f"score={self.score!r} reads the CLS token's attention, and this model has no prefix token"
        if not skipping and self.graph != "spatial" and self.neighbors >= patches:
            return f"neighbors={self.neighbors} needs more than {self.neighbors} patch tokens, and there are {patches}"
        return ""

    def refuse_stream(self, stream: fx.Node, axis: TokenAxis) -> str:
        return ""

    def start(self, emit: Emit, stream: fx.Node, axis: TokenAxis, places: fx.Node | None) -> StreamState:
        home = home_of(axis.domain.grid)
        places_too = () if places is None else (places,)
        over = (home.sides, axis.prefix, self._graph_over(home), self.neighbors, *places_too)
        graph = emit(gtp_fx.token_graph.default, stream, *over)
        return StreamState(carried=(emit(operator.getitem, graph, 0), emit(operator.getitem, graph, 1), *places_too))

    def attend(self, emit: Emit, attention: Attention, axis: TokenAxis, scored: bool) -> tuple[fx.Node, fx.Node]:
        both = emit(
            gtp_fx.attention_with_scores.default,
            attention.q,
            attention.k,
            attention.v,
            attention.bias,
            attention.scale,
            self.attention_sparsity,
            self.score if scored else "none",
            axis.prefix,
            axis.suffix,
            *attention.others(),
        )
        return emit(operator.getitem, both, 0), emit(operator.getitem, both, 1)

    def attend_cells(
        self, emit: Emit, attention: Attention, grid: Sequence[int], cells: Sequence[int]
    ) -> tuple[fx.Node, fx.Node]:
        operands = (attention.q, attention.k, attention.v, attention.bias, attention.scale)
        both = emit(gtp_fx.attention_with_cell_scores.default, *operands, self.score, list(grid), list(cells))
        return emit(operator.getitem, both, 0), emit(operator.getitem, both, 1)

    def reduce(self, emit: Emit, site: AtSite, state: StreamState) -> tuple[fx.Node, StreamState]:
        """Remove the `site.removed` lowest patches and propagate them.

        `kept` and `removed` are indices into the stream's own patches. `kept_index` and `removed_index` are positions
        among all of them, which is what the token graph is built over.
        """
        near, inv_sqrt_degree, *places = state.carried
        split = emit(gtp_fx.select.default, site.scores, site.removed)
        kept, removed = emit(operator.getitem, split, 0), emit(operator.getitem, split, 1)
        kept_index, removed_index = kept, removed
        if state.index is not None:
            kept_index = emit(aten.gather.default, state.index, 1, kept)
            removed_index = emit(aten.gather.default, state.index, 1, removed)
        home = home_of(site.axis.domain.grid)
        over = (home.sides, self._graph_over(home), *places)
        weights = emit(gtp_fx.propagation_weights.default, near, inv_sqrt_degree, kept_index, removed_index, *over)
        shorter = emit(gtp_fx.propagate.default, site.stream, weights, kept, removed, self.alpha, site.axis.prefix)
        scale = None
        if self.reads_scales or self.weighted_pooling:
            # A token's scale is propagated like its features: one channel, no prefix. Before the first site all are 1.
            before = state.scale or emit(aten.ones_like.default, site.scores)
            column = emit(aten.unsqueeze.default, before, 2)
            moved = emit(gtp_fx.propagate.default, column, weights, kept, removed, self.alpha, 0)
            scale = emit(aten.squeeze.dim, moved, 2)
        removal = Removal(kept, removed, kept_index, removed_index, weights, self.alpha)
        return shorter, StreamState(kept_index, scale, state.carried, removal)

    def _graph_over(self, grid: Grid) -> str:
        """Return the kind of graph over a grid's patches: semantic alone where their places aren't known."""
        return self.graph if grid.placed else "semantic"

    def variants(self) -> Sequence[GTP]:
        """Return strategies that differ from this one in one number, in the score, in the graph, or in whether scales
        are told.

        The values are those of the paper's tables, all that a token holds and fewer neighbours, and column sums alone
        as a score. The sparsity theta is varied only where this strategy has one.
        """
        changes: list[dict[str, Any]] = [{"alpha": alpha} for alpha in (0.0, 0.05, 0.1, 0.2, 0.4, 1.0)]
        if self.graph != "spatial":
            changes += [{"neighbors": count} for count in (2, 4, 8, 16)]
        changes += [{"graph": graph} for graph in GRAPHS]
        changes += [{"token_scale": scales} for scales in (AUTO, True)]
        changes += [
            {"score": score} for score in ("mixed-max", "mixed-mean", "broadcast-max", "broadcast-mean", "cls-mean")
        ]
        if self.attention_sparsity < 1.0:
            changes += [{"attention_sparsity": theta} for theta in (0.6, 0.7, 0.8, 0.9)]
        varied = [replace(self, **change) for change in changes]
        return [variant for variant in dict.fromkeys(varied) if variant != self]

    def start_works(self, grid: Sequence[int], channels: int, images: int, dtype: str, kernels: bool) -> list[Work]:
        return graph_works(self.graph, self.neighbors, math.prod(grid), channels, images, dtype, kernels)

    def site_works(self, site: SiteShape, scales_read: bool) -> list[Work]:
        return propagation_works(self.score, self.graph, self.neighbors, site, scales_read)

    def scoring_works(self, heads: int, queries: Any, keys: Any, images: int, dtype: str) -> list[Work]:
        return scoring_works(self.score, heads, queries, keys, images, dtype)
