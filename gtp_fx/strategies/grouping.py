"""Strategies that are one function from tokens to groups: subclass `Grouping`, write `group`, register.

    from gtp_fx.strategies import Grouping, Groups, Tokens, dropped, register_strategy

    @register_strategy
    @dataclass(frozen=True)
    class Norm(Grouping):
        '''Tokens of small norm are removed.'''

        name: ClassVar[str] = "norm"

        def group(self, tokens: Tokens) -> Groups:
            return dropped(tokens.patches_BnC.norm(dim=-1), tokens.removed)

A graph operator (`torch.ops.gtp_fx.group`) calls the function. It is composite like the others: it takes any batch and
any device, and the compiler sees through it. Fields are the method's parameters; they are plain values, since they
travel with the operator. Autocast is off inside, so ranking and matching run in float32.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import fx
from torch.ops import aten, gtp_fx  # type: ignore[import-not-found]

from gtp_fx.errors import OptionError
from gtp_fx.ops.attention import SCORES
from gtp_fx.strategies.group_operator import key_of, written
from gtp_fx.strategies.plain_numbers import take_plain_numbers
from gtp_fx.strategies.pricing import FLOAT, kernel_scoring_works, rows_moved, scoring_works
from gtp_fx.strategies.protocol import Strategy, unknown_prefix
from gtp_fx.strategies.sites import AtSite, Attention, Emit, Removal, SiteShape, StreamState
from gtp_fx.strategies.tokens import Groups, Tokens
from gtp_fx.targets.work import Work
from gtp_fx.types.axes import TokenAxis
from gtp_fx.types.grids import Grid


@dataclass(frozen=True)
class Grouping:
    """A strategy whose `group` decides at each site which tokens are removed, and what becomes of them.

    Subclasses are frozen dataclasses.

    merges: `group` returns weights.
    sized: `group` returns sizes.
    carries: `group` returns numbers for its own next site.
    before_attention: sites are at a block's input.
    shortens_queries: what is left there attends to all that was: keys and values are computed before the site.
    skips_branches: where a grid has to stay whole, tokens may skip branches by `score`, and get their neighbours'
        results where `recovers_branches`, else the share `branch_mean` of their window's mean result.
    returns: removed tokens may be chosen again, and are back in place after the last block.
    score: what attention ranks tokens by, a name in `gtp_fx.ops.attention.SCORES`; "none" where that is the class's
        default, because its `group` reads no scores.
    token_scale: later attention reads the sizes.
    """

    name: ClassVar[str]
    _key: ClassVar[str]
    merges: ClassVar[bool] = False
    sized: ClassVar[bool] = False
    carries: ClassVar[bool] = False
    before_attention: ClassVar[bool] = False
    shortens_queries: ClassVar[bool] = False
    skips_branches: ClassVar[bool] = False
    restores_tokens: ClassVar[bool] = False
    score: str = "none"
    token_scale: bool = True

    def __post_init__(self) -> None:
        take_plain_numbers(self)
        owner, usual = type(self).__name__, type(self).score
        if not isinstance(self.token_scale, bool):
            raise OptionError(f"{owner}(token_scale={self.token_scale!r}): give True or False")
        if self.score not in ("none", *SCORES):
            names = "\n".join(f"  {name!r}: {meaning}" for name, meaning in SCORES.items())
            raise OptionError(f"{owner}(score={self.score!r}) is unknown; score is 'none' or one of\n{names}")
        if self.score != "none" and usual == "none":
            raise OptionError(f"{owner}(score={self.score!r}): {self.name} doesn't rank by attention; leave score out")
        if self.score == "none" and usual != "none":
            raise OptionError(f"{owner}(score='none'): {self.name} ranks by attention; its own is {usual!r}")

    needs_full_maps: ClassVar[bool] = False
    rewrites_every_attention: ClassVar[bool] = False
    weighted_pooling: ClassVar[bool] = False
    recovers_branches: ClassVar[bool] = True

    @property
    def branch_mean(self) -> float:
        """Return the share of its window's mean result that a token gets which skips a branch; 0 for nothing."""
        return 0.0

    @property
    def rests_windows(self) -> bool:
        """Return whether whole windows rest where they can, instead of tokens that skip a branch."""
        return False

    @property
    def rest_share(self) -> float:
        """Return what a token of a window that rests gets of its cell's change; 0 for nothing."""
        return 0.0

    rest_keys: ClassVar[str] = "cells"
    recovers_updates: ClassVar[bool] = False

    @property
    def recovers_by_attention(self) -> bool:
        """Return whether removed tokens are recovered by attention over what their site left."""
        return False

    @property
    def code_keys(self) -> tuple[str, ...]:
        """Return the keys (`gtp_fx.strategies.keys`) of all the code that this strategy runs."""
        return (key_of(type(self)),)

    @property
    def code(self) -> str:
        return "".join(self.code_keys)

    def group(self, tokens: Tokens) -> Groups:
        """Decide which tokens a site removes, and what becomes of them."""
        raise NotImplementedError(f"{type(self).__name__} has no group()")

    def group_flops(self, site: SiteShape) -> Any:
        """Return the FLOPs of `group`'s matrix products for all images; 0 where it multiplies no matrices.

        A multiply-add counts 2. They have to be those that torch counts, because a budget is strict. `site` holds
        numbers, or arrays of them.
        """
        return 0

    def settled(self, streams: Sequence[tuple[Grid, Sequence[int]]]) -> Grouping:
        return self

    def positions(self, blocks: int) -> Collection[int]:
        """Return the blocks of a stream, counted from 0, at which tokens may be removed."""
        return range(blocks)

    def refuse(self, axis: TokenAxis, skipping: bool = False) -> str:
        if skipping and not self.skips_branches and not self.rests_windows:
            return (
                f"{self.name} shortens a stream, and here the grid has to stay whole, so that tokens can only skip "
                f"branches: strategies 'regeneration', 'gtp', 'idle' and 'topk' do that"
            )
        if self.score.startswith("cls") and axis.domain.grid.guarded:
            return unknown_prefix(self.score)
        if self.score.startswith("cls") and (axis.prefix == 0 or skipping):
            return (
                f"score={self.score!r} reads the CLS token's attention, and there is no prefix token here: "
                f"score='broadcast-mean' reads that of all tokens"
            )
        return ""

    def refuse_stream(self, stream: fx.Node, axis: TokenAxis) -> str:
        return ""

    def start(self, emit: Emit, stream: fx.Node, axis: TokenAxis, places: fx.Node | None) -> StreamState:
        return StreamState()

    def attend(self, emit: Emit, attention: Attention, axis: TokenAxis, scored: bool) -> tuple[fx.Node, fx.Node]:
        operands = (attention.q, attention.k, attention.v, attention.bias, attention.scale)
        score = self.score if scored else "none"
        around = (axis.prefix, axis.suffix, *attention.others())
        both = emit(gtp_fx.attention_with_scores.default, *operands, 1.0, score, *around)
        return emit(operator.getitem, both, 0), emit(operator.getitem, both, 1)

    def attend_cells(
        self, emit: Emit, attention: Attention, grid: Sequence[int], cells: Sequence[int]
    ) -> tuple[fx.Node, fx.Node]:
        operands = (attention.q, attention.k, attention.v, attention.bias, attention.scale)
        both = emit(gtp_fx.attention_with_cell_scores.default, *operands, self.score, list(grid), list(cells))
        return emit(operator.getitem, both, 0), emit(operator.getitem, both, 1)

    def reduce(self, emit: Emit, site: AtSite, state: StreamState) -> tuple[fx.Node, StreamState]:
        found = self._grouped(emit, site, state)
        kept, removed, weights = found["kept"], found["removed"], found.get("weights")
        prefix, suffix = site.axis.prefix, site.axis.suffix
        if weights is None:
            shorter = emit(gtp_fx.take_tokens.default, site.stream, kept, 0, 1, prefix, suffix)
        else:
            shorter = emit(gtp_fx.propagate.default, site.stream, weights, kept, removed, 1.0, prefix, found["own"])
        # From the second site on, indices into this site's patches differ from positions on the whole grid.
        kept_index, removed_index = kept, removed
        if state.index is not None:
            kept_index, removed_index = (emit(aten.gather.default, state.index, 1, part) for part in (kept, removed))
        carried = [emit(aten.gather.default, found["carried"], 1, kept)] if self.carries else []
        if self.sized:
            carried.append(found["size"])
        removal = Removal(kept, removed, kept_index, removed_index, weights, 1.0, found.get("own"))
        return shorter, StreamState(kept_index, found["size"] if self.reads_scales else None, tuple(carried), removal)

    @property
    def reads_scales(self) -> bool:
        """Return whether attention reads the sizes."""
        return self.sized and self.token_scale

    def ranking(self, emit: Emit, site: AtSite) -> fx.Node | None:
        """Return the node of `Tokens.score_Bn`: attention's scores, where the strategy reads them."""
        return site.scores

    def _grouped(self, emit: Emit, site: AtSite, state: StreamState) -> dict[str, fx.Node]:
        """Insert the operator and return its results by name."""
        attention = site.attention
        listed = emit(
            gtp_fx.group.default,
            site.stream,
            None if attention is None else attention.of_tokens(emit, attention.k),
            None if attention is None else attention.of_tokens(emit, attention.v),
            self.ranking(emit, site),
            state.carried[-1] if state.carried and self.sized else None,
            state.index,
            state.carried[0] if state.carried and self.carries else None,
            site.axis.domain.grid.sides,
            [site.removed, site.axis.prefix, site.axis.suffix, site.block],
            written(self),
        )
        return {name: emit(operator.getitem, listed, i) for i, name in enumerate(self.results())}

    def results(self) -> list[str]:
        """Return the names of those fields of `Groups` that `group` returns, in the operator's order."""
        given = {"weights": self.merges, "own": self.merges, "size": self.sized, "carried": self.carries}
        return ["kept", "removed", *(name for name, is_given in given.items() if is_given)]

    def put_back(self, emit: Emit, stream: fx.Node, state: StreamState, axis: TokenAxis) -> fx.Node:
        raise AssertionError(f"tokens that {self.name!r} takes away don't return")

    def variants(self) -> Sequence[Strategy]:
        """Return the strategy with sizes told to attention or not, and with the scores that nets with CLS and without
        support."""
        changes: list[dict[str, Any]] = [{"token_scale": not self.token_scale}] if self.sized else []
        changes += [{"score": score} for score in ("cls-mean", "broadcast-mean") if self.score not in ("none", score)]
        return [replace(self, **change) for change in changes]

    def start_works(self, grid: Sequence[int], channels: int, images: int, dtype: str, kernels: bool) -> list[Work]:
        return []

    def scoring_works(self, heads: int, queries: Any, keys: Any, images: int, dtype: str) -> list[Work]:
        return scoring_works(self.score, heads, queries, keys, images, dtype)

    def site_works(self, site: SiteShape, scales_read: bool) -> list[Work]:
        removed = site.patches_in - site.patches_out
        tokens_in, tokens_out = site.others + site.patches_in, site.others + site.patches_out
        summed = 2 * site.images * tokens_out * removed * site.channels if self.merges else 0
        ranked = site.images * FLOAT * site.patches_in
        scoring = self.scoring_works(site.heads, tokens_in, tokens_in, site.images, site.dtype)
        if site.kernels:
            scoring = kernel_scoring_works(self.score, site)
        return [
            *scoring,
            Work("product", self.group_flops(site), ranked, site.patches_in, site.patches_in, site.images),
            Work("sort", bytes=ranked),
            Work("gather", summed, rows_moved(site), launches=2),
        ]
