"""Exact: padding isn't projected: linear layers run before tokens are padded, and after padding is cropped.

    x ─ pad ─ windows ─ linear        becomes        x ─ linear without bias ─ pad ─ windows ─ + bias
    linear ─ back ─ crop              becomes        back ─ crop ─ linear

Where windows don't divide a grid it is padded with zeros, of which a layer makes its bias: SAM at 512 x 512 pixels has
32 x 32 patches and projects 42 x 42. Between the layer and the padding, or the crop, stands only what moves tokens
about and leaves their features alone, so it moves as many features of the layer's other side. Attention still sees the
padding.

After the crop the layer multiplies less and nothing else changes. Before the padding more features are padded than were
before, so there it is done only where the target is predicted to gain: multiplying has to cost more than moving.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.capture.layers import stays_whole
from gtp_fx.graph import edit
from gtp_fx.graph.nodes import only_user, pads_with_zeros
from gtp_fx.graph.operators import PADDINGS, PERMUTATIONS, REARRANGED, VIEWS
from gtp_fx.graph.rearrangements import order_of
from gtp_fx.graph.symbols import shape_of
from gtp_fx.targets.target import Target


@dataclass(frozen=True)
class Padded:
    """What is padded, moved about and projected.

    chain: from the padding on to what the projections read.
    linears: these.
    """

    chain: tuple[fx.Node, ...]
    linears: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Cropped:
    """What is projected, moved about and cropped.

    linear: the projection.
    chain: from its reader on to the last crop.
    """

    linear: fx.Node
    chain: tuple[fx.Node, ...]


def project_unpadded(gm: fx.GraphModule, target: Target | None = None) -> fx.GraphModule:
    """Return a copy of `gm` in which no padding is projected; `gm` itself where none is, or none should be left out.

    target: the processor whose rates tell whether projecting before the padding pays; None where that isn't asked.
    """
    padded = [one for one in (_padded(gm, node) for node in gm.graph.nodes) if one is not None and _pays(one, target)]
    before = {linear for one in padded for linear in one.linears}
    others = [node for node in gm.graph.nodes if node not in before]
    cropped = [one for one in (_cropped(gm, node) for node in others) if one is not None]
    if not padded and not cropped:
        return gm
    gm, copies = edit.copy_with_nodes(gm)
    for padding in padded:
        _project_before(gm.graph, padding, copies)
    for crop in cropped:
        _project_after(gm.graph, crop, copies)
    return edit.finish(gm)


def _padded(gm: fx.GraphModule, pad: fx.Node) -> Padded | None:
    """Return what a padding of tokens leads to, where that is projections alone."""
    if pad.target not in PADDINGS or not _keeps_features(pad):
        return None
    chain = [pad]
    while (only := only_user(chain[-1])) is not None and _keeps_features(only):
        chain.append(only)
    linears = tuple(chain[-1].users)
    if not linears or not all(_is_projection_of(gm, node, chain[-1]) for node in linears):
        return None
    return Padded(tuple(chain), linears) if _tokens(pad) > _tokens(pad.args[0]) else None


def _cropped(gm: fx.GraphModule, linear: fx.Node) -> Cropped | None:
    """Return how the result of a projection is cropped, where nothing else reads it.

    Where it is padded before that it stays: the layer would make its bias of those zeros.
    """
    if linear.target is not aten.linear.default or stays_whole(gm, linear):
        return None
    chain, crops = [linear], 0
    while (only := only_user(chain[-1])) is not None and only.target not in PADDINGS and _keeps_features(only):
        chain.append(only)
        if only.target is aten.slice.Tensor and _tokens(only) < _tokens(only.args[0]):
            crops = len(chain)
    return Cropped(linear, tuple(chain[1:crops])) if crops else None


def _is_projection_of(gm: fx.GraphModule, node: fx.Node, x: fx.Node) -> bool:
    """Return whether a node is a linear layer on `x` that may be taken apart."""
    return node.target is aten.linear.default and node.args[0] is x and not stays_whole(gm, node)


def _keeps_features(node: fx.Node) -> bool:
    """Return whether a node moves, pads or drops whole tokens of its operand, [..., features], alone."""
    operand = node.args[0] if node.args else None
    if not isinstance(operand, fx.Node) or "val" not in operand.meta or not hasattr(operand.meta["val"], "shape"):
        return False
    rank, features = len(shape_of(operand)), shape_of(operand)[-1:]
    last = rank - 1
    if node.target in VIEWS:
        return rank > 1 and features == shape_of(node)[-1:]
    if node.target in PERMUTATIONS:
        return order_of(node)[-1] == last
    if node.target in REARRANGED:
        return True
    args: Any = (*node.args, 0, 0)
    if node.target is aten.slice.Tensor:
        return bool(args[1] % rank != last)
    if node.target is aten.roll.default:
        return len(node.args) == 3 and all(dim % rank != last for dim in _listed(args[2]))
    return node.target in PADDINGS and pads_with_zeros(node) and not any(args[1][:2])


def _listed(dims: Any) -> list[int]:
    return [dims] if isinstance(dims, int) else list(dims)


def _tokens(node: Any) -> int:
    """Return how many rows of features a value has, of one image or of all."""
    return math.prod(shape_of(node)[:-1])


def _pays(padded: Padded, target: Target | None) -> bool:
    """Return whether projecting before the padding is predicted to take less time."""
    if target is None:
        return True
    first = padded.chain[0]
    before: Any = first.args[0]
    features, made = shape_of(first)[-1], sum(shape_of(linear)[-1] for linear in padded.linears)
    value = first.meta["val"]
    flops: int = 2 * (_tokens(first) - _tokens(before)) * features * made
    moved: int = value.element_size() * (_tokens(first) + _tokens(before)) * (made - features)
    seconds: float = flops / target.rate(str(value.dtype).removeprefix("torch."))
    return seconds > moved / target.bandwidth


def _project_before(graph: fx.Graph, padded: Padded, copies: dict[fx.Node, fx.Node]) -> None:
    """Let projections read what is padded, pad what they make, and add the bias to tokens and padding."""
    for linear in (copies[node] for node in padded.linears):
        _, weight, *rest = linear.args
        bias = rest[0] if rest else None
        emit = edit.Emitter(graph, like=linear, before=linear)
        new = emit(aten.linear.default, copies[padded.chain[0]].args[0], weight)
        new = _moved(graph, padded.chain, copies, new, shape_of(linear)[-1], linear)
        linear.replace_all_uses_with(new if bias is None else emit(aten.add.Tensor, new, bias))


def _project_after(graph: fx.Graph, cropped: Cropped, copies: dict[fx.Node, fx.Node]) -> None:
    """Move and crop what a projection reads, and project what is left."""
    linear, end = copies[cropped.linear], copies[cropped.chain[-1]]
    x, *parameters = linear.args
    new = _moved(graph, cropped.chain, copies, x, shape_of(x)[-1], end)  # type: ignore[arg-type]
    with graph.inserting_before(end):
        projected = graph.node_copy(linear)
    projected.args = (new, *parameters)
    projected.meta.pop("val", None)
    end.replace_all_uses_with(projected)


def _moved(
    graph: fx.Graph, chain: tuple[fx.Node, ...], copies: dict[fx.Node, fx.Node], x: Any, features: int, before: fx.Node
) -> fx.Node:
    """Do with another value, of so many features, what a chain does with its own."""
    for node in map(copies.__getitem__, chain):
        with graph.inserting_before(before):
            copy = graph.node_copy(node)
        args = [x, *node.args[1:]]
        if node.target in VIEWS:
            sizes: list[Any] = list(args[1])
            args[1] = [*sizes[:-1], sizes[-1] if sizes[-1] == -1 else features]
        edit.set_args(copy, tuple(args))
        copy.meta.pop("val", None)
        x = copy
    return x  # type: ignore[no-any-return]
