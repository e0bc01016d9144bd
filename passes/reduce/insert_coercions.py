"""Coercions inserted into a graph: an operand comes at the level that its reader needs.

Of older values the remaining tokens are taken, and in newer ones the removed tokens are recovered, one level after the
other, since each site has its own neighbours. What several readers need is inserted once. Which coercions there are is
found in `gtp_fx.types.coercions`.
"""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.ops import aten, gtp_fx  # type: ignore[import-not-found]

from gtp_fx.graph import edit
from gtp_fx.graph.torch_internals import is_higher_order
from gtp_fx.passes.reduce.walk import Walk
from gtp_fx.strategies.sites import Removal
from gtp_fx.types.coercions import Coercion, Step
from gtp_fx.types.grids import Grid
from gtp_fx.types.places import home_of

RECOVERED = "gtp_recovered"
"""Meta key of a value in which removed tokens have been put back for a reader."""


def coerce(walk: Walk, coercion: Coercion) -> None:
    """Give the coercion's node its operand in the type that it needs."""
    node, operand = coercion.node, coercion.operand
    emit = edit.Emitter(walk.graph, like=node, before=node)
    given = value = walk.current(operand)
    for dims in range(coercion.lead):
        value = _once(walk, (operand, dims), emit, aten.unsqueeze.default, value, 0)
    # One operator per level and dimension; the key says what was done so far, so that equal work is shared. It
    # names the tokens: two streams of one size may read one table.
    for i, step in enumerate(coercion.steps):
        for level in _levels_between(step):
            grid = step.axis.domain.grid
            key = (operand, coercion.lead, coercion.steps[:i], step.dim, grid, level, coercion.updates)
            if coercion.updates and step.recovers:
                value = _updated(walk, key, emit, value, coercion.images, step, level)
            else:
                value = _once(walk, key, emit, *_move(walk, emit, value, coercion.images, step, level))
    if coercion.repeats > 1:
        value = _repeated(walk, emit, value, coercion)
    if any(step.recovers for step in coercion.steps):
        value.meta[RECOVERED] = True
    for again in coercion.rearranged:  # with the sizes that the original has
        given, whole = walk.current(again), walk.args[again][1:]
        value = _once(walk, (again, operand, "whole"), emit, again.target, value, *whole)
    node.replace_input_with(given, value)
    if not is_higher_order(node.target):  # whose operands come whole again, so that its value is what it was
        node.meta.pop("val", None)


def _repeated(walk: Walk, emit: edit.Emitter, value: fx.Node, coercion: Coercion) -> fx.Node:
    """Return a value for each image as often as the reader has heads for it: [B, …] -> [B · H, …]."""
    place, heads = coercion.images, coercion.images + 1
    key = (value, "repeated", place, coercion.repeats)
    sizes = [coercion.repeats if dim == heads else -1 for dim in range(len(coercion.kind) + 1)]
    apart = _once(walk, (key, "apart"), emit, aten.unsqueeze.default, value, heads)
    shown = _once(walk, (key, "shown"), emit, aten.expand.default, apart, sizes)
    return _once(walk, key, emit, aten.flatten.using_ints, shown, place, heads)


def _updated(walk: Walk, key: Any, emit: edit.Emitter, value: fx.Node, images: int, step: Step, level: int) -> fx.Node:
    """Return a later stream brought back to `level`.

    That is the stream as it entered the site after that level, plus the recovered change since then.
    """
    grid, around = step.axis.domain.grid, (images, step.dim, step.axis.prefix, step.axis.suffix)
    before, removal = walk.stream_at_site[grid, level], walk.states[grid][level + 1].removal
    assert removal is not None
    kept_before = _once(walk, (key, "then"), emit, gtp_fx.take_tokens.default, before, removal.kept, *around)
    change = _once(walk, (key, "change"), emit, aten.sub.Tensor, value, kept_before)
    back = _once(walk, (key, "back"), emit, *_move(walk, emit, change, images, step, level))
    return _once(walk, key, emit, aten.add.Tensor, back, before)


def _once(walk: Walk, key: Any, emit: edit.Emitter, target: Any, *args: Any) -> fx.Node:
    """Emit a call once per key: a rotary table is read by every block, and should be taken from once per level."""
    if key not in walk.coerced:
        walk.coerced[key] = emit(target, *args)
    return walk.coerced[key]


def _move(walk: Walk, emit: edit.Emitter, value: fx.Node, images: int, step: Step, level: int) -> tuple[Any, ...]:
    """Return the operator and arguments that bring `value` to `level` along one dimension."""
    grid, around = step.axis.domain.grid, (images, step.dim, step.axis.prefix, step.axis.suffix)
    states = walk.states[grid]
    if not step.recovers:
        removal = states[level].removal
        from_whole = step.axis.domain.level == 0
        index = states[level].index if from_whole else removal.kept  # type: ignore[union-attr]
        return (gtp_fx.take_tokens.default, value, index, *around)
    removal = states[level + 1].removal
    assert removal is not None
    if (grid, level) not in walk.shares:
        walk.shares[grid, level] = _shares(walk, emit, grid, level, removal)
    return (gtp_fx.recover.default, value, walk.shares[grid, level], removal.kept, removal.removed, *around)


def _shares(walk: Walk, emit: edit.Emitter, grid: Grid, level: int, removal: Removal) -> fx.Node:
    """Return the shares [B, P, K] of the tokens that a site left in each that it removed."""
    if (grid, level) in walk.maps:
        of = walk.maps[grid, level]
        operands = (of.q, of.k, removal.removed, of.axis.prefix, of.axis.suffix, of.scale)
        return emit(gtp_fx.attended_shares.default, *operands)
    places = () if walk.places[grid] is None else (walk.places[grid],)
    where = (removal.kept_index, removal.removed_index, home_of(grid).sides, *places)
    return emit(gtp_fx.recovery_weights.default, removal.weights, *where)


def _levels_between(step: Step) -> list[int]:
    """Return the levels to pass through, the last one included. From the whole grid, any level is one step away."""
    here = step.axis.domain.level
    if step.recovers:
        return list(range(here - 1, step.level - 1, -1))
    return [step.level] if here == 0 else list(range(here + 1, step.level + 1))
