"""States of the tokens of a grid: the places in a graph where one value is all that remains of them.

    x ─┬─ attention ─ y ─┬─ x + y - (y·u) u            s [B, N, S, C] ─┬─ weights per token ─┬─ mixed + outer(y, β)
       └─── u = x / |x| ─┘                                              └─ attention ─ y ─────┘

A residual need not be a sum with a fixed share of the stream. Whatever is computed token by token from the stream and
a branch (a gate, a projection of one onto the other, several streams that are mixed anew at every layer) ends in a
value through which everything passes that anything later reads of the tokens. It is what a token *is* at that place,
so there tokens can be removed as they are from a residual stream: `propagate` adds to a token that stays a share of the
whole state of those that go. Of several streams, each stream of the one gets a share of the same stream of the other.
What the mixing before has made of a removed token's branch is in its state; weights that a later mixing derives from
the state are derived from what was passed on as well.
"""

from __future__ import annotations

import math

from torch import fx

from gtp_fx.graph.nodes import ancestors, descendants
from gtp_fx.graph.operators import ATTENTION, PERMUTATIONS, VIEWS
from gtp_fx.types.axes import Dim, Factor, Plain, TensorType, TokenAxis, holds_images, is_plain, token_axis
from gtp_fx.types.grids import Grid, GridAxis
from gtp_fx.types.infer import WholeTyping
from gtp_fx.types.rules.registry import TypeList

_RANK = 3
"""Dimensions of a stream: images, tokens, features."""


def state_after(attention: fx.Node, axis: TokenAxis, typing: WholeTyping) -> fx.Node | None:
    """Return the first state of its tokens that an attention's result is part of; None where there is none.

    It has as many features as one that the block begins with. There is none, either, where nothing goes past the
    attention to be joined with its result, or where another block's attention comes first.
    """
    states, beside = _states(attention, axis.domain.grid, typing)
    before, after = ancestors(attention), descendants(attention)
    blocks = [n for n in typing.graph.nodes if n.target in ATTENTION and _queries(n, typing) == axis]
    last, following = ([n for n in blocks if n in side] for side in (before, after))
    past = set().union(*({n} | ancestors(n) for n in last))
    future = set().union(*({n} | descendants(n) for n in following))
    rows = [state for state in states if _is_state(typing.type(state), axis)]
    wide = {_features(state, typing) for state in rows if state in before - past}
    found = [state for state in rows if state in after - future and _features(state, typing) in wide]
    if not found or not beside:
        return None
    # What is stacked to be mixed, or mixed to be read, is wider than what a block begins and ends with.
    least = min(_features(state, typing) for state in found)
    return next(state for state in found if _features(state, typing) == least)


def state_before(attention: fx.Node, site: fx.Node, axis: TokenAxis, typing: WholeTyping) -> fx.Node | None:
    """Return the last state of its tokens that an attention is computed from; None where there is none.

    It has as many features as the state `site` after it; what is mixed for the attention to read may be a state too.
    """
    states, _ = _states(attention, axis.domain.grid, typing)
    before = ancestors(attention)
    wide = _features(site, typing)
    rows = [state for state in states if state in before and _is_state(typing.type(state), axis)]
    found = [state for state in rows if _features(state, typing) == wide]
    if not found:
        return None
    # Of one value in several layouts, that in which its streams lie side by side as features comes before others.
    chain = [found[-1]]
    while chain[-1].target in (*VIEWS, *PERMUTATIONS) and chain[-1].args[0] in found:
        chain.append(chain[-1].args[0])  # type: ignore[arg-type]
    joined = [state for state in chain if len(typing.type(state)) == _RANK and has_rows(typing.type(state), axis)]
    return joined[0] if joined else chain[-1]


def _features(state: fx.Node, typing: WholeTyping) -> int:
    """Return how many features a token has in a state, times the images, which are the same in every state."""
    return math.prod(factor.size for dim in typing.type(state) for factor in dim if isinstance(factor, Plain))


def _queries(attention: fx.Node, typing: WholeTyping) -> TokenAxis | None:
    """Return the tokens that an attention's queries are; None where they are none."""
    return token_axis(typing.type(attention.args[0])[-2])  # type: ignore[arg-type]


def has_rows(kind: TensorType, axis: TokenAxis) -> bool:
    """Return whether a type is [images, tokens, features…], of these tokens."""
    apart = len(kind) > 2 and is_plain(kind[0]) and all(map(is_plain, kind[2:]))
    return apart and token_axis(kind[1]) == axis and not holds_others(kind[0])


def holds_others(images: Dim) -> bool:
    """Return whether something else is merged with images in a dimension: streams of each, say."""
    return holds_images(images) and not all(isinstance(factor, Plain) and factor.images for factor in images)


def row_order(kind: TensorType, axis: TokenAxis) -> list[int] | None:
    """Return the order of a type's factors that are longer than one in which images come first, then these tokens.

    Others, which are features, follow as they come. None where a type has other factors, such as the side of a grid.
    """
    factors = factors_of(kind)
    images = [i for i, factor in enumerate(factors) if isinstance(factor, Plain) and factor.images]
    tokens = [i for i, factor in enumerate(factors) if factor == axis]
    features = [i for i, factor in enumerate(factors) if isinstance(factor, Plain) and not factor.images]
    apart = len(images) == len(tokens) == 1 and len(factors) == len(features) + 2
    return [*images, *tokens, *features] if apart else None


def factors_of(kind: TensorType) -> list[Factor]:
    """Return the factors of a type's dimensions, in order, but for those of size one."""
    return [factor for dim in kind for factor in dim if factor.whole_size != 1]


def _is_state(kind: TensorType, axis: TokenAxis) -> bool:
    """Return whether a type holds [images, tokens, features…], in whichever order, apart or merged."""
    turned = len(kind) == _RANK and [token_axis(dim) for dim in kind if not is_plain(dim)] == [axis]
    return turned or has_rows(kind, axis) or row_order(kind, axis) is not None


def _states(attention: fx.Node, grid: Grid, typing: WholeTyping) -> tuple[list[fx.Node], bool]:
    """Return the nodes after which no other value over the grid is read, and whether the attention isn't one of them.

    That is read off the order of the graph: a state is where all values but one have had their last reader.
    """
    order = {node: place for place, node in enumerate(typing.graph.nodes)}
    last = {node: max((order[user] for user in node.users), default=-1) for node in order}
    states: list[fx.Node] = []
    opened: set[fx.Node] = set()
    beside = False
    for node, place in order.items():
        opened = {value for value in opened if last[value] > place}
        if last[node] > place and _runs_over(node, grid, typing):
            opened.add(node)
        if opened == {node} and typing.is_tensor(node):
            states.append(node)
        if node is attention:
            beside = bool(opened - {node})
    return states, beside


def _runs_over(node: fx.Node, grid: Grid, typing: WholeTyping) -> bool:
    """Return whether a value, or one of several, runs over the tokens of a grid, or a side of it."""
    found = typing.types.get(node)
    kinds = found.items if isinstance(found, TypeList) else () if found is None else (found,)
    return any(
        (f.domain.grid if isinstance(f, TokenAxis) else f.grid) == grid
        for kind in kinds
        for dim in kind
        for f in dim
        if isinstance(f, TokenAxis | GridAxis)
    )
