"""Coercions: what brings a value to the level that its reader requires, where levels meet.

    older meets newer     a rotary table, a relative-position bias, a long skip: take its part for the remaining tokens
    newer must be older   a map that is returned, an operator that needs the whole grid: recover the removed tokens

They work like a type checker's coercions, and are found on the typed graph. `remove_tokens` inserts them, and the cost
model prices them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.errors import Refusal
from gtp_fx.graph.nodes import is_input, operator_name, refusal
from gtp_fx.graph.operators import FLATTENINGS, PERMUTATIONS, VIEWS
from gtp_fx.types.axes import (
    Dim,
    TensorType,
    TokenAxis,
    holds_images,
    images_dims,
    is_plain,
    plain,
    token_axes,
    token_axis,
    whole_size,
)
from gtp_fx.types.grids import Grid
from gtp_fx.types.infer import SiteTyping, whole
from gtp_fx.types.rules.registry import RuleResult


@dataclass(frozen=True)
class Step:
    """The change of one dimension from one level of its stream to another.

    dim: number of the dimension.
    axis: the tokens that it runs over, at the level that it comes in.
    level: the one to reach, newer (taking) or older (recovering).
    """

    dim: int
    axis: TokenAxis
    level: int

    @property
    def recovers(self) -> bool:
        """Return whether the step recovers removed tokens."""
        return self.level < self.axis.domain.level


@dataclass(frozen=True)
class Coercion:
    """A change to `operand` before `node` reads it.

    node: the reader.
    operand: the value.
    lead: dimensions of size 1 to put before the operand's own, where its reader broadcasts over them.
    kind: the operand's type, including those.
    images: the operand's dimension that holds images, of size B, or 1 where all images share the value.
    steps: the changes of level.
    reason: why the reader needs other tokens.
    updates: the operand is a residual stream; a removed token becomes what it was plus its neighbours' mean change.
    repeats: how often each image follows in a row in the images' dimension afterwards: as often as the reader has
        heads, where it has them merged with images and the value is shared by all.
    rearranged: where `node` reads a value in which images are spread over several dimensions, the views, permutations
        and slices that made it of `operand`, to be done again on what the steps give.
    """

    node: fx.Node
    operand: fx.Node
    lead: int
    kind: TensorType
    images: int
    steps: tuple[Step, ...]
    reason: str
    updates: bool = False
    repeats: int = 1
    rearranged: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Coercions:
    """Every coercion of a typed graph, in graph order, and the places where none is possible."""

    found: tuple[Coercion, ...]
    refused: tuple[Refusal, ...]

    @property
    def levels_recovered(self) -> frozenset[tuple[Grid, int]]:
        """Return the sites whose removed tokens are put back: each one's grid, and its level before the site."""
        return frozenset(
            (step.axis.domain.grid, level)
            for coercion in self.found
            for step in coercion.steps
            for level in range(step.level, step.axis.domain.level)
        )

    def by_node(self) -> dict[fx.Node, list[Coercion]]:
        """Return the coercions of each reader."""
        found: dict[fx.Node, list[Coercion]] = {}
        for coercion in self.found:
            found.setdefault(coercion.node, []).append(coercion)
        return found


class _CannotCoerce(Exception):
    """A coercion is not possible; the message is the reason that a user reads."""


def find_coercions(typing: SiteTyping) -> Coercions:
    """Compare the type of every operand with the one that its reader requires."""
    found, refused = [], []
    for node, answer in typing.results.items():
        for operand, wanted in answer.operands.items():
            own = typing.type(operand)
            if all(_fits(mine, theirs) for mine, theirs in zip(own, wanted, strict=True)):
                continue
            try:
                found.append(_coercion(node, operand, own, wanted, answer, typing))
            except _CannotCoerce as reason:
                before = _before_the_batch_was_spread(node, operand, own, wanted, answer, typing)
                if before is None:
                    refused.append(refusal(node, str(reason)))
                else:
                    found.append(before)
    return Coercions(tuple(found), tuple(refused))


def _before_the_batch_was_spread(
    node: fx.Node, operand: fx.Node, own: TensorType, wanted: TensorType, answer: RuleResult, typing: SiteTyping
) -> Coercion | None:
    """Return the recovery of what `operand` is a rearrangement of, where all tokens are wanted; None where none helps.

    In [B, 2, K, C], two views of each image, tokens are those of [2B, K, C].
    """
    rearranged: list[fx.Node] = []
    if wanted != whole(own):
        return None
    source = operand
    while source.target in (*VIEWS, *FLATTENINGS, *PERMUTATIONS, aten.unsqueeze.default, aten.slice.Tensor):
        rearranged.insert(0, source)
        source = source.all_input_nodes[0]
        kind = typing.type(source)
        if typing.results[rearranged[0]].barrier or kind == whole(kind):
            return None
        try:
            found = _coercion(node, source, kind, whole(kind), replace(answer, broadcasts=False), typing)
        except _CannotCoerce:
            continue
        return replace(found, updates=False, rearranged=tuple(rearranged))
    return None


def _named(operand: fx.Node) -> str:
    """Return an operand as a person knows it: a parameter by its name, anything else by its operator."""
    return str(operand.target) if is_input(operand) else f"the result of {operator_name(operand)}"


def _fits(own: Dim, wanted: Dim) -> bool:
    """Return whether a dimension needs no coercion.

    Two whole dimensions fit whatever they are. Where either is shortened, only equal ones do.
    """
    return own == wanted or not any(axis.domain.level for axis in token_axes((own, wanted)))


def _coercion(
    node: fx.Node, operand: fx.Node, own: TensorType, wanted: TensorType, answer: RuleResult, typing: SiteTyping
) -> Coercion:
    reason = answer.barrier or ("the model returns these tokens" if node.op == "output" else "")
    reason = reason or f"it reads {_named(operand)} beside another level of the stream"
    steps = tuple(_steps(own, wanted, operand))
    if any(step.recovers for step in steps) and not operand.meta["val"].dtype.is_floating_point:
        raise _CannotCoerce(
            f"{_named(operand)} holds {operand.meta['val'].dtype}, of which no neighbours' mean can be made"
        )
    grids = {step.axis.domain.grid for step in steps}
    if len(grids) > 1:
        raise _CannotCoerce(f"{_named(operand)} runs over the tokens of two grids")
    images = typing.images[grids.pop()]
    lead, place, repeats = _images_dim(own, answer, images, operand)
    if any(step.dim + lead == place for step in steps):
        raise _CannotCoerce(f"{_named(operand)} has no dimension for the images")
    steps = tuple(Step(step.dim + lead, step.axis, step.level) for step in steps)
    updates = (node, operand) in typing.whole_edges and not lead
    return Coercion(node, operand, lead, (*plain(*(1,) * lead), *own), place, steps, reason, updates, repeats)


def _steps(own: TensorType, wanted: TensorType, operand: fx.Node) -> Iterator[Step]:
    for dim, (mine, theirs) in enumerate(zip(own, wanted, strict=True)):
        if _fits(mine, theirs):
            continue
        to = token_axis(theirs)
        if to is None or (token_axes((mine,)) and token_axis(mine) is None):
            raise _CannotCoerce(f"tokens of {_named(operand)} are merged with another dimension")
        # Two other things pair with all tokens index by index: a plain dimension of their number, and a whole grid of
        # the same shape.
        at = token_axis(mine) or to.at(0)
        level = at.domain.level
        if not at.pairs_with(to) or (level and at.domain.grid != to.domain.grid):
            raise _CannotCoerce(f"{_named(operand)} runs over other tokens than its reader")
        yield Step(dim, to.at(level), to.domain.level)


def _images_dim(own: TensorType, answer: RuleResult, images: int, operand: fx.Node) -> tuple[int, int, int]:
    """Return how many leading dimensions an operand needs, which of its dimensions then holds images, and `repeats`.

    Leading dimensions are added where the reader broadcasts. Raises _CannotCoerce where no dimension, or more than one,
    could hold images.
    """
    known = [d for d, dim in enumerate(own) if holds_images(dim) and whole_size(dim) == images]
    if len(known) == 1 and is_plain(own[known[0]]):
        return 0, known[0], 1
    output = answer.output
    if answer.broadcasts and isinstance(output, tuple):
        # A broadcast operand is right-aligned with the output, which tells where its images are.
        places = images_dims(output, images)
        if len(places) > 1:
            raise _CannotCoerce(
                f"several dimensions are as long as the batch, beside {_named(operand)}: which one it is can't be told"
            )
        if places:
            place = places[0] - (len(output) - len(own))
            if place < 0:
                return len(output) - len(own), places[0], 1
            if whole_size(own[place]) in (1, images):
                return 0, place, 1
        elif (merged := _merged_with_images(output, images)) is not None:
            place, repeats = merged
            missing = len(output) - len(own)
            if place < missing or whole_size(own[place - missing]) == 1:
                return max(missing - place, 0), max(place - missing, 0), repeats
    places = images_dims(own, images)
    if len(places) > 1:
        raise _CannotCoerce(
            f"several dimensions of {_named(operand)} are as long as the batch: which one it is can't be told"
        )
    if places:
        return 0, places[0], 1
    raise _CannotCoerce(f"{_named(operand)} has no dimension for the images, which keep different tokens each")


def _merged_with_images(kind: TensorType, images: int) -> tuple[int, int] | None:
    """Return the one dimension in which the batch comes before something else (heads), and the size of that."""
    found = [
        (place, whole_size(dim[1:]))
        for place, dim in enumerate(kind)
        if is_plain(dim) and holds_images(dim[:1]) and not holds_images(dim[1:]) and whole_size(dim[:1]) == images
    ]
    return found[0] if len(found) == 1 else None
