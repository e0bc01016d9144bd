"""IdleViT (arXiv 2310.05654): tokens that aren't chosen skip blocks, and may be chosen again."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx
from torch.ops import aten, gtp_fx  # type: ignore[import-not-found]

from gtp_fx.strategies.grouping import Grouping
from gtp_fx.strategies.registry import register_strategy
from gtp_fx.strategies.sites import AtSite, Emit, Removal, StreamState
from gtp_fx.types.axes import TokenAxis


@register_strategy
@dataclass(frozen=True)
class Idle(Grouping):
    """Token idling: at each site, the tokens that CLS attends to most are chosen for the blocks until the next site.

    The others idle in their places. An idle token is ranked by the score that it had when it last took part; the
    publication recomputes the keys of all tokens in every block to score them by CLS. The publication chooses before a
    block; here, as in GTP, tokens are chosen after its attention. Where a grid has to stay whole, idle tokens get
    nothing from a branch.

    score: "cls-mean" in the publication; "broadcast-mean" where there is no CLS.
    """

    name: ClassVar[str] = "idle"
    restores_tokens: ClassVar[bool] = True
    skips_branches: ClassVar[bool] = True
    recovers_branches: ClassVar[bool] = False
    score: str = "cls-mean"

    def start(self, emit: Emit, stream: fx.Node, axis: TokenAxis, places: fx.Node | None) -> StreamState:
        return StreamState()

    def reduce(self, emit: Emit, site: AtSite, state: StreamState) -> tuple[fx.Node, StreamState]:
        """Choose anew among all tokens. The new state carries the whole stream and all tokens' scores."""
        prefix, suffix = site.axis.prefix, site.axis.suffix
        whole, scores = site.stream, site.scores
        if state.index is not None:  # after the first site: put this stream's tokens and scores among the idle ones
            assert scores is not None
            whole = emit(gtp_fx.put_back.default, state.carried[0], site.stream, state.index, prefix, suffix)
            scores = emit(aten.scatter.src, state.carried[1], 1, state.index, scores)
        idle = site.axis.domain.whole_count - site.count + site.removed
        chosen = emit(gtp_fx.select.default, scores, idle)
        kept, removed = emit(operator.getitem, chosen, 0), emit(operator.getitem, chosen, 1)
        shorter = emit(gtp_fx.take_tokens.default, whole, kept, 0, 1, prefix, suffix)
        assert scores is not None
        return shorter, StreamState(
            kept, None, (whole, scores), Removal(kept, removed, kept, removed, None, of_whole=True)
        )

    def put_back(self, emit: Emit, stream: fx.Node, state: StreamState, axis: TokenAxis) -> fx.Node:
        assert state.index is not None
        return emit(gtp_fx.put_back.default, state.carried[0], stream, state.index, axis.prefix, axis.suffix)
