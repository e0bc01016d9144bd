"""torch's flex_attention, opened: its functions of one score, written as operators on all scores at once.

    flex_attention(q, k, v, score_mod, block_mask)  =  softmax(where(mask, score_mod(scale · q·kᵀ), -inf)) · v

Its operator calls two graphs: one changes a score, the other says whether it counts. Both are functions of numbers (the
score, and the places of image, head, query and key); of broadcast tensors they are the same where every operator in
them works element by element. Where no score is changed, what is left is scaled_dot_product_attention.

Shapes: B images, H heads of queries, G of keys, N queries, M keys, D channels.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph import edit
from gtp_fx.graph.nodes import ancestors, names_in_place
from gtp_fx.graph.torch_internals import (
    indexing_by_tensors,
    is_functorch,
    is_operator,
    mode_of,
    region_operator,
    trace_functional,
)

_NUMBERS = (aten.new_ones.default, aten.new_zeros.default, aten.new_full.default, aten.full.default)
"""Operators that make a number, which is one for all scores as well."""
_CALLS = ("call_function", "call_method")


def open_flex_attention(gm: fx.GraphModule, key: str = "val") -> bool:
    """Write each flex_attention of a graph as plain operators, in place; return whether there was one.

    One whose log-sum-exp is read, or whose functions hold what isn't done element by element, stays as it is.

    gm: a captured graph, or Dynamo's.
    key: the key of values in its nodes' metadata.
    """
    found = [node for node in gm.graph.nodes if region_operator(node.target) == "flex_attention"]
    masks = (mask for node in found for mask in node.args[4])
    read = [mask for mask in masks if isinstance(mask, fx.Node)]
    opened = [_open(gm, node, key) for node in found]
    if any(opened):
        _drop_block_masks(gm.graph, read)
        gm.graph.lint()
        gm.recompile()
    return any(opened)


def _open(gm: fx.GraphModule, node: fx.Node, key: str) -> bool:
    """Write one call out. Return whether it could be read."""
    arguments: tuple[Any, ...] = node.args
    q_BHND, k_BGMD, v_BGMD, change_at, block_mask, scale, _, change_others, mask_others = arguments
    firsts = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
    if any(user.users for user in node.users if user not in firsts):
        return False
    query, keys = q_BHND.meta[key], k_BGMD.meta[key]
    shape = (*query.shape[:3], keys.shape[2])
    with mode_of(query), torch.no_grad():
        numbers = [_places(shape, dim, query.device) for dim in range(4)]
        score = query.new_empty(shape)
    parts = []
    for at, first, others in ((change_at, (score, *numbers), change_others), (block_mask[-1], numbers, mask_others)):
        body = operator.attrgetter(str(at.target))(gm)
        parts.append(_by_element(body, [*first, *(other.meta[key] for other in others)]))
    change, mask = parts
    if change is None or mask is None:
        return False
    wide = query.dtype if query.dtype is torch.float64 else torch.float32  # of scores, as in the operator
    emit = edit.Emitter(gm.graph, like=node, before=node)
    places = [emit(aten.arange.default, _size(emit, q_BHND, query, dim)) for dim in range(3)]
    places.append(emit(aten.arange.default, _size(emit, k_BGMD, keys, 2)))
    for place in places:
        place.kwargs = {"device": query.device}
    where = [emit(aten.reshape.default, at, [-1, *(1 for _ in range(3 - dim))]) for dim, at in enumerate(places)]
    counts = None
    if _output(mask).target is not aten.new_ones.default:  # else every score counts
        counts = _copied(emit, mask, (*where, *mask_others))
    groups = int(query.shape[1]) // int(keys.shape[1])
    if _output(change) is change.graph.find_nodes(op="placeholder")[0]:
        out = emit(aten.scaled_dot_product_attention.default, q_BHND, k_BGMD, v_BGMD, counts)
        out.kwargs = {"scale": scale, **({"enable_gqa": True} if groups > 1 else {})}
    else:
        if groups > 1:
            k_BGMD, v_BGMD = (emit(aten.repeat_interleave.self_int, x, groups, 1) for x in (k_BGMD, v_BGMD))
        logits = emit(aten.matmul.default, q_BHND, emit(aten.transpose.int, k_BGMD, -2, -1))
        logits = emit(aten.mul.Tensor, _cast(emit, logits, query.dtype, wide), scale)
        logits = _copied(emit, change, (logits, *where, *change_others))
        if counts is not None:
            logits = emit(aten.where.ScalarOther, counts, logits, -float("inf"))
        weights = _cast(emit, emit(aten.softmax.int, logits, -1), wide, query.dtype)
        out = emit(aten.matmul.default, weights, v_BGMD)
    for reader in firsts:
        out.meta[key] = reader.meta[key]  # with its strides, by which views after it were traced
        reader.replace_all_uses_with(out)
    for user in list(node.users):
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)
    for unread in reversed([at for at in gm.graph.nodes if at in emit.inserted]):
        if not unread.users and unread is not out:
            gm.graph.erase_node(unread)
    with mode_of(query), torch.no_grad():
        for made in (at for at in gm.graph.nodes if at in emit.inserted):
            if key not in made.meta:
                args, kwargs = fx.map_arg((made.args, made.kwargs), lambda read: read.meta[key])
                made.meta[key] = made.target(*args, **kwargs)  # type: ignore[operator]
    return True


def _places(shape: Sequence[Any], dim: int, device: torch.device) -> Tensor:
    """Return the places along one dimension of the scores, to be broadcast with them."""
    return torch.arange(shape[dim], device=device).reshape(-1, *(1 for _ in range(3 - dim)))


def _size(emit: edit.Emitter, node: fx.Node, value: Tensor, dim: int) -> Any:
    """Return a size, as a node where it is open."""
    size = value.shape[dim]
    return emit(aten.sym_size.int, node, dim) if isinstance(size, torch.SymInt) else int(size)


def _cast(emit: edit.Emitter, value: fx.Node, before: torch.dtype, after: torch.dtype) -> fx.Node:
    """Cast a value of one dtype to another, where that is another."""
    return value if before is after else emit(aten.to.dtype, value, after)


def _by_element(body: fx.GraphModule, values: Sequence[Tensor]) -> fx.GraphModule | None:
    """Trace a function of numbers on tensors that are broadcast; None where it isn't one of each element alone."""

    def broadcast(*given: Tensor) -> Any:
        with indexing_by_tensors():
            return body(*given)

    traced = trace_functional(broadcast, values)
    if traced is None:
        return None
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            return None
        if node.op == "call_function" and node.target not in (aten.index.Tensor, *_NUMBERS):
            by_element = is_operator(node.target) and torch.Tag.pointwise in node.target.tags
            if not by_element:
                return None
    return traced


def _output(traced: fx.GraphModule) -> fx.Node:
    """Return what a traced function returns."""
    (output,) = traced.graph.output_node().all_input_nodes
    assert isinstance(output, fx.Node)
    return output


def _copied(emit: edit.Emitter, traced: fx.GraphModule, given: Sequence[fx.Node]) -> fx.Node:
    """Copy a traced function's operators into a graph, and return its result."""
    copies: dict[fx.Node, fx.Node] = dict(zip(traced.graph.find_nodes(op="placeholder"), given, strict=True))
    for node in traced.graph.nodes:
        if node.op == "call_function":
            copies[node] = emit(node.target, *fx.map_arg(node.args, copies.__getitem__))
            copies[node].kwargs = fx.map_arg(node.kwargs, copies.__getitem__)
    return copies[_output(traced)]


def _drop_block_masks(graph: fx.Graph, read: Sequence[fx.Node]) -> None:
    """Erase what nothing but block masks was computed for, `torch.func`'s levels included, in place.

    read: what the calls read of block masks.
    """
    made = {node for mask in read for node in (mask, *ancestors(mask)) if node.op in _CALLS}
    if not made:
        return
    live, nodes = ancestors(graph.output_node()), list(graph.nodes)
    first, last = min(map(nodes.index, made)), max(map(nodes.index, made))
    for number, node in reversed(list(enumerate(nodes))):
        between = first <= number <= last or (number > last and is_functorch(node.target))
        if node.op in _CALLS and between and node not in live and not node.users:
            target = getattr(node.target, "__name__", str(node.target)).partition(".")[0]
            if not (names_in_place(target) and not live.isdisjoint(node.all_input_nodes)):
                graph.erase_node(node)
