"""Branches: the part of a block that some tokens can skip where the stream has to keep its whole grid.

    x ─┬─ norm ─ MLP ─┬─ add        x ─┬─ kept tokens of each window ─ norm ─ MLP ─ recover ─┬─ add
       └──────────────┘                └─────────────────────────────────────────────────────┘

The attention before the branch ranks the tokens of each window, or of the whole grid where it attends over all of it.
The branch follows that attention's residual add. It is as much of what runs beside the stream as is token-wise, from
its end backward, here and at every residual add before the next attention (`branch_parts`). Tokens that are no patches
(registers of a window, the CLS of a frame or of a clip) never skip it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import fx

from gtp_fx.analysis.branch_layouts import check_layouts, fits, layouts_of, patches_of, windows_in, without_others
from gtp_fx.analysis.branch_parts import NoBranch, Part, parts_after
from gtp_fx.analysis.queries_and_keys import keys_beside, lead_and_heads, pooled_to
from gtp_fx.graph.nodes import attention_dropout
from gtp_fx.strategies.sites import Attention
from gtp_fx.types.axes import TensorType, token_axis, whole_size
from gtp_fx.types.grids import GridAxis
from gtp_fx.types.infer import WholeTyping
from gtp_fx.types.merging import split_tokens


@dataclass(frozen=True)
class Branch:
    """The part of one block that only the kept tokens of each window go through.

    parts: what they go through, in graph order: the MLP, and any that follow before the next attention.
    scores: the type of the attention's scores, [images and windows, patches].
    region: the layout in which tokens are chosen, [images and windows, patches]; features follow.
    rows: the same with the prefix and suffix tokens that each window has in the branch; where there are some, patches
        are in the branch's own order, and else row by row.
    attended: number of tokens in a window of the attention, those that are no patches among them.
    lead: dimensions of the attention's query that are images and windows.
    heads: the dimension of the query that is heads; none where there is one head without a dimension.
    cells: the shape of the coarser grid that keys are pooled to; () where keys are the tokens themselves.
    apart: prefix and suffix tokens of no window of the attention (the CLS of a clip whose frames it attends in). They
        go through the branch on their own, and are in one dimension with the patches.
    others: how many tokens of an image are no patches and go through the branch, whichever patches skip it.
    stream: the residual stream after the attention, where it holds the patches of the windows and nothing else.
    """

    parts: tuple[Part, ...]
    scores: TensorType
    region: TensorType
    rows: TensorType
    attended: int
    lead: tuple[int, ...]
    heads: tuple[int, ...]
    cells: tuple[int, ...] = ()
    apart: tuple[int, int] = (0, 0)
    others: int = 0
    stream: fx.Node | None = None

    @property
    def windows(self) -> int:
        """The number of windows in an image, of each of which equally many patches skip."""
        return windows_in(self.region[0])

    @property
    def tokens(self) -> int:
        """The number of patches in a window."""
        return whole_size(self.region[1])

    @property
    def attentions(self) -> int:
        """The number of windows in which an image's tokens attend; they may be larger than those of the branch."""
        return windows_in(self.scores[0])

    @property
    def around(self) -> tuple[int, int]:
        """How many prefix and suffix tokens each window has in the branch."""
        axis = token_axis(self.rows[1])
        return (0, 0) if axis is None else (axis.prefix, axis.suffix)

    @property
    def inside(self) -> tuple[fx.Node, ...]:
        """The nodes of all parts."""
        return tuple(node for part in self.parts for node in part.inside)

    def copied(self, at: Mapping[fx.Node, fx.Node]) -> Branch:
        """Return this branch in a copy of the graph. at: each node's copy."""
        stream = None if self.stream is None else at[self.stream]
        return replace(self, parts=tuple(part.copied(at) for part in self.parts), stream=stream)


def find_branch(attention: fx.Node, site: fx.Node, typing: WholeTyping) -> Branch:
    """Find the branch of a block.

    attention: the block's attention, which ranks the tokens.
    site: the residual add after it.

    Raises NoBranch, with the reason, where there is none.
    """
    first, *later = parts_after(site, typing)
    operands = Attention.of(attention)
    query = typing.type(operands.q)
    if attention_dropout(attention):
        raise NoBranch("attention dropout is active, which attention with scores does not have")
    attended = token_axis(query[-2])
    patches = query[-2] if attended is None else without_others(attended)
    if not all(isinstance(f, GridAxis) for f in split_tokens(patches)):
        raise NoBranch("its queries are merged with something else, or some of them have left")
    if keys_beside(query, typing.type(operands.k)) not in (None, (0, 0)):
        raise NoBranch("its keys hold more than its tokens")
    lead, heads = lead_and_heads(query)
    scores: TensorType = (tuple(f for dim in lead for f in query[dim]), patches)
    of_first = typing.type(first.result)[:-1]
    region, rows, apart, others = layouts_of(scores, of_first)
    check_layouts(scores, region, rows, patches_of(of_first) if any(apart) else of_first)

    def is_chosen_alike(part: Part) -> bool:
        """Return whether the tokens that a later part keeps can be those of the first one."""
        own = typing.type(part.result)[:-1]
        return own == of_first or (not any(apart) and fits(scores, region, rows, own))

    parts = (first, *filter(is_chosen_alike, later))
    cells = pooled_to(query, typing.type(operands.k))
    stream = None if others or any(apart) or not fits(scores, region, region, typing.type(site)[:-1]) else site
    return Branch(parts, scores, region, rows, whole_size(query[-2]), lead, heads, cells, apart, others, stream)
