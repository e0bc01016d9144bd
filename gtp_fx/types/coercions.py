"""Where levels meet: what has to be done to a value so that it comes in the type that its reader asks for.

    older meets newer     a rotary table, a relative-position bias, a long skip: take what it holds for the tokens left
    newer must be older   a map that is returned, an operator that needs the whole grid: recover the tokens that left

A type checker's coercions, found on the typed graph. `remove_tokens` inserts them, the cost model prices them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from gtp_fx.errors import Refusal
from gtp_fx.graph.nodes import refusal
from gtp_fx.types.axes import Dim, TensorType, TokenAxis, images_dims, plain, token_axes, token_axis, whole_size
from gtp_fx.types.infer import SiteTyping
from gtp_fx.types.rules.registry import RuleResult


@dataclass(frozen=True)
class Step:
    """One dimension from one level of its stream to another. axis: the tokens it runs over, at the level it comes in.

    dim: which dimension. level: the one to reach; newer (taking) or older (recovering).
    """

    dim: int
    axis: TokenAxis
    level: int

    @property
    def recovers(self) -> bool:
        return self.level < self.axis.domain.level


@dataclass(frozen=True)
class Coercion:
    """What `node` needs done to `operand`.

    lead: dimensions of size 1 to put before the operand's own, where its reader broadcasts over them.
    kind: the operand's type with those. images: its dimension that holds images: size B, or 1 where all share the value.
    reason: why its reader wants other tokens. updates: the operand is a residual stream, whose tokens come back as what they
    were, changed as their neighbours were.
    """

    node: fx.Node
    operand: fx.Node
    lead: int
    kind: TensorType
    images: int
    steps: tuple[Step, ...]
    reason: str
    updates: bool = False


@dataclass(frozen=True)
class Coercions:
    """Every coercion of a typed graph, in graph order, and the places where none is possible."""

    found: tuple[Coercion, ...]
    refused: tuple[Refusal, ...]

    def by_node(self) -> dict[fx.Node, list[Coercion]]:
        found: dict[fx.Node, list[Coercion]] = {}
        for coercion in self.found:
            found.setdefault(coercion.node, []).append(coercion)
        return found


class _CannotCoerce(Exception):
    """The message is the reason a user reads."""


def find_coercions(typing: SiteTyping) -> Coercions:
    """Compare the type of every operand with the one its reader asks for."""
    found, refused = [], []
    for node, answer in typing.answers.items():
        for operand, wanted in answer.operands.items():
            own = typing.type(operand)
            if all(_fits(mine, theirs) for mine, theirs in zip(own, wanted, strict=True)):
                continue
            try:
                found.append(_coercion(node, operand, own, wanted, answer, typing))
            except _CannotCoerce as reason:
                refused.append(refusal(node, str(reason)))
    return Coercions(tuple(found), tuple(refused))


def _fits(own: Dim, wanted: Dim) -> bool:
    """Whole beside whole fits as it is, whatever it is; beside a shortened axis only the very same does."""
    return own == wanted or not any(axis.domain.level for axis in token_axes((own, wanted)))


def _coercion(
    node: fx.Node, operand: fx.Node, own: TensorType, wanted: TensorType, answer: RuleResult, typing: SiteTyping
) -> Coercion:
    reason = answer.barrier or ("the model returns these tokens" if node.op == "output" else "")
    reason = reason or f"it reads {operand.name} beside another level of the stream"
    steps = tuple(_steps(own, wanted, operand))
    if any(step.recovers for step in steps) and not operand.meta["val"].dtype.is_floating_point:
        raise _CannotCoerce(
            f"{operand.name} holds {operand.meta['val'].dtype}, of which no neighbours' mean can be made"
        )
    grids = {step.axis.domain.grid for step in steps}
    if len(grids) > 1:
        raise _CannotCoerce(f"{operand.name} runs over the tokens of two grids")
    images = typing.images[grids.pop()]
    lead, place = _images_dim(own, answer, images, operand)
    if any(step.dim + lead == place for step in steps):
        raise _CannotCoerce(f"{operand.name} has no dimension for the images")
    steps = tuple(Step(step.dim + lead, step.axis, step.level) for step in steps)
    updates = (node, operand) in typing.whole_edges and not lead
    return Coercion(node, operand, lead, (*plain(*(1,) * lead), *own), place, steps, reason, updates)


def _steps(own: TensorType, wanted: TensorType, operand: fx.Node) -> Iterator[Step]:
    for dim, (mine, theirs) in enumerate(zip(own, wanted, strict=True)):
        if _fits(mine, theirs):
            continue
        to = token_axis(theirs)
        if to is None or (token_axes((mine,)) and token_axis(mine) is None):
            raise _CannotCoerce(f"tokens of {operand.name} are merged with another dimension")
        # A plain dimension as long as all tokens, and a whole grid of the same shape, pair with them index by index.
        at = token_axis(mine) or to.at(0)
        level = at.domain.level
        if not at.pairs_with(to) or (level and at.domain.grid != to.domain.grid):
            raise _CannotCoerce(f"{operand.name} runs over other tokens than its reader")
        yield Step(dim, to.at(level), to.domain.level)


def _images_dim(own: TensorType, answer: RuleResult, images: int, operand: fx.Node) -> tuple[int, int]:
    """How many leading dimensions to add to an operand (where its reader broadcasts), and which one then holds images."""
    output = answer.output
    if answer.broadcasts and isinstance(output, tuple):
        places = images_dims(output, images)
        if len(places) > 1:
            raise _CannotCoerce(
                f"several dimensions are as long as the batch, beside {operand.name}: which one it is can't be told"
            )
        if places:
            place = places[0] - (len(output) - len(own))
            if place < 0:
                return len(output) - len(own), places[0]
            if whole_size(own[place]) in (1, images):
                return 0, place
    places = images_dims(own, images)
    if len(places) > 1:
        raise _CannotCoerce(
            f"several dimensions of {operand.name} are as long as the batch: which one it is can't be told"
        )
    if places:
        return 0, places[0]
    raise _CannotCoerce(f"{operand.name} has no dimension for the images, which keep different tokens each")
