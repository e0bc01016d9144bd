"""Queries of some tokens alone: where a block's queries come from, as far back as that concerns each token by itself.

    x ─ linear ─ views ─ unbind ─ q ─ (scale, norm) ─ views ─ attention
                              └─ k, v

Features are followed by name (`features.py`), so that the same queries can be made of any rows of x, by those rows of the
weight that are the queries' own.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.axes import Grid, GridAxis, TensorType, is_plain, product, split_tokens, whole_size
from gtp_fx.features import (
    Lost,
    features_like,
    features_of,
    is_move,
    moved,
    named,
    parts_in,
    without_part,
)
from gtp_fx.infer import Typing
from gtp_fx.rules.pointwise import pointwise
from gtp_fx.rules.registry import find

_SPLITTERS = (aten.unbind.int, aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default)
_ALONG_FEATURES = (aten.layer_norm.default, aten.rms_norm.default, aten.linalg_vector_norm.default)


@dataclass(frozen=True)
class Fused:
    """Queries are the first of `parts` equal parts of a projection's features, `stride` apart.

    moves: the views between the projection and the splitter. sized: for each of them that is a view, the dimension that
    the parts are in. items: the splitter's.
    """

    moves: tuple[tuple[fx.Node, int | None], ...]
    splitter: fx.Node
    dim: int
    parts: int
    stride: int
    items: dict[int, fx.Node]


@dataclass(frozen=True)
class Projection:
    """linear: of which the queries are made; entry: what that reads. fused: where others are made of it as well.

    computes: what is computed behind it of each query by itself. source: the value that these begin with.
    kind: the queries' type as attention reads them, heads and features as parts of `features`, which are the queries' own.
    sizes: what asks a query's value for a size alone, and the dimension of the entry that has the same.
    """

    linear: fx.Node
    entry: fx.Node
    fused: Fused | None
    computes: tuple[fx.Node, ...]
    source: fx.Node
    kind: TensorType
    features: Grid
    sizes: tuple[tuple[fx.Node, int], ...]


def find_projection(attention: fx.Node, canonical: bool, typing: Typing) -> Projection:
    """The projection of an attention's queries. canonical: they are [rows, heads, tokens, features]. Raises Lost."""
    query = attention.args[0]
    assert isinstance(query, fx.Node)
    behind, node = _moves_back(query, {attention})
    computes, source = _computes(node, behind[0] if behind else attention, canonical and not behind, typing)
    between, node = _moves_back(source, set(source.users))
    if between and len(node.users) > 1:
        raise Lost(f"{node.name} is read by something else than the queries as well")
    if node.target is operator.getitem:
        fused, linear, kind = _fused(node, typing)
        features = features_like(features_of(linear, whole_size(typing.type(linear)[-1])), fused.parts)
    else:
        linear, fused = node, None
        if linear.target is not aten.linear.default:
            raise Lost(f"{linear.name} is no projection")
        features = features_of(linear, whole_size(typing.type(linear)[-1]))
        kind = named(typing.type(linear), [len(typing.type(linear)) - 1], features)
    for move in between:
        kind = moved(move, kind, typing)
    before = kind
    for move in behind:
        kind = moved(move, kind, typing)
    if any(find(n.target) is not pointwise for n in computes) and before[-1] != kind[-1]:
        raise Lost("the features of a head are normalised in another layout than attention reads them")
    entry = linear.args[0]
    assert isinstance(entry, fx.Node)
    sizes = tuple(
        (user, _same_size(user, entry, typing)) for node in (source, *computes) for user in _asking_sizes(node)
    )
    return Projection(linear, entry, fused, computes, source, kind, features, sizes)


def _moves_back(node: fx.Node, users: set[fx.Node]) -> tuple[list[fx.Node], fx.Node]:
    """The moves that end in `node`, read by `users` alone, in graph order; and what they begin with."""
    found: list[fx.Node] = []
    while is_move(node) and set(node.users) <= users:
        found.append(node)
        users = {node}
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return found[::-1], node


def _computes(last: fx.Node, reader: fx.Node, canonical: bool, typing: Typing) -> tuple[tuple[fx.Node, ...], fx.Node]:
    """What is computed of each query by itself, ending in `last`, which `reader` reads; and the one value it begins with."""
    found: list[fx.Node] = []
    pending = [last]
    begins: set[fx.Node] = set()
    lead = typing.type(last)[:-1]
    while pending:
        node = pending.pop()
        if node in found or node in begins:
            continue
        if not _is_of_each(node, canonical, typing):
            begins.add(node)
            continue
        found.append(node)
        pending += [n for n in node.all_input_nodes if typing.is_tensor(n) and not _is_shared(n, typing)]
    if len(begins) != 1:
        raise Lost("queries are made of several values")
    (source,) = begins
    in_order = tuple(node for node in last.graph.nodes if node in found)
    inside = {*in_order, reader}
    if not all(set(node.users) - set(_asking_sizes(node)) <= inside for node in (source, *in_order)):
        raise Lost(f"{source.name} is read by something else than the queries as well")
    if any(typing.type(node)[:-1] != lead for node in (source, *in_order)):
        raise Lost("queries change their layout")
    return in_order, source


def _asking_sizes(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if user.target is aten.sym_size.int]


def _same_size(size: fx.Node, entry: fx.Node, typing: Typing) -> int:
    """The dimension of `entry` that is as long as the one that `size` asks for."""
    asked, dim = size.args
    wanted = typing.type(asked)[dim]  # type: ignore[arg-type, index]
    for d, own in enumerate(typing.type(entry)):
        if own == wanted:
            return d
    raise Lost("a size of the queries is asked for that what they are made of doesn't have")


def _is_of_each(node: fx.Node, canonical: bool, typing: Typing) -> bool:
    """Computed of each query by itself, the same way in any layout with the features of a head last."""
    if not typing.is_tensor(node) or is_move(node) or node.target in (aten.zeros_like.default, aten.ones_like.default):
        return False
    rank = len(typing.type(node))
    if node.target in _ALONG_FEATURES:
        if node.target is aten.linalg_vector_norm.default:
            dims, keep = (*node.args[2:4], False)[:2] if len(node.args) > 2 else (None, False)
            return bool(keep) and dims in ([-1], [rank - 1])
        return len(node.args[1]) == 1  # type: ignore[arg-type]
    if node.target is not aten.expand.default and find(node.target) is not pointwise:
        return False
    tensors = [n for n in node.all_input_nodes if typing.is_tensor(n)]
    beside = [typing.type(n) for n in tensors if _is_shared(n, typing)]
    if len(beside) == len(tensors):
        return False
    # A value for each head is good in the layout in which it stands beside the queries; one for each token never is.
    of_heads = -3 if canonical else None
    return all(whole_size(dim) == 1 or d == of_heads for kind in beside for d, dim in enumerate(kind[:-1], -len(kind)))


def _is_shared(node: fx.Node, typing: Typing) -> bool:
    """The same for all tokens and images: a parameter, or made of some."""
    kind = typing.type(node)
    return all(map(is_plain, kind)) and not any(f.images for dim in kind for f in dim)  # type: ignore[union-attr]


def _fused(item: fx.Node, typing: Typing) -> tuple[Fused, fx.Node, TensorType]:
    """How `item`, the first of several, lies in a projection; that projection; the item's type, with its own features."""
    splitter = item.args[0]
    assert isinstance(splitter, fx.Node)
    if splitter.target not in _SPLITTERS or any(user.target is not operator.getitem for user in splitter.users):
        raise Lost(f"{splitter.name} doesn't divide a projection")
    source = splitter.args[0]
    assert isinstance(source, fx.Node)
    moves, linear = _moves_back(source, {splitter})
    if linear.target is not aten.linear.default or len(linear.users) != 1:
        raise Lost(f"{linear.name} is no projection of queries, keys and values alone")
    if item.args[1] != 0:
        raise Lost("queries aren't the first part of their projection")
    kind = typing.type(linear)
    features = features_of(linear, whole_size(kind[-1]))
    kind = named(kind, [len(kind) - 1], features)
    kinds = []
    for move in moves:
        kind = moved(move, kind, typing)
        kinds.append(kind)
    position = 1 if splitter.target is aten.unbind.int else 2
    given: Any = splitter.args[position] if len(splitter.args) > position else 0
    dim = int(given) % len(kind)
    values = splitter.meta["val"]
    parts = len(values)
    if (
        len({value.shape for value in values}) != 1
        or len(split_tokens(kind[dim])) != 1
        or not parts_in(kind[dim], features)
    ):
        raise Lost("queries are no equal part of their projection")
    (along,) = parts_in(kind[dim], features)
    inner = along.whole_size // parts
    stride = along.stride * inner
    kept = kind[:dim] + kind[dim + 1 :]
    if splitter.target is not aten.unbind.int:
        kept = (*kind[:dim], product([GridAxis(features, 0, inner, along.stride)]), *kind[dim + 1 :])
    sized = tuple((move, _dim_of(at, along, features)) for move, at in zip(moves, kinds, strict=True))
    items = {user.args[1]: user for user in splitter.users}
    own = tuple(without_part(d, features, stride, parts) for d in kept)
    return Fused(sized, splitter, dim, parts, stride, items), linear, own  # type: ignore[arg-type]


def _dim_of(kind: TensorType, along: GridAxis, features: Grid) -> int:
    """The dimension of `kind` that the parts are in."""
    for d, dim in enumerate(kind):
        for factor in split_tokens(dim):
            if isinstance(factor, GridAxis) and factor.grid == features:
                reach = factor.stride * factor.whole_size
                if factor.stride <= along.stride and reach >= along.stride * along.whole_size:
                    return d
    raise Lost("the parts of a projection lie in several dimensions")
