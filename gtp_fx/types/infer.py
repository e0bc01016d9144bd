"""The forward walk, which gives every value of a graph a type.

`infer_types(graph)` runs each node's rule in graph order, with every token in place; `infer_with_sites(graph, sites)`
does so where tokens are removed. A site is a node after which the residual stream is shorter: everything computed from
it has a newer domain. Where an older value meets it, the rule requires the older one in the newer type. Nothing is
rewritten here; the result says what a rewrite has to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from gtp_fx.graph.nodes import is_input
from gtp_fx.types import rules as _rules
from gtp_fx.types.axes import (
    Dim,
    Plain,
    TensorType,
    TokenAxis,
    as_images,
    holds_images,
    plain,
    token_axes,
    token_axis,
    whole_size,
)
from gtp_fx.types.frames import FRAMES, separate_frames
from gtp_fx.types.grids import Grid
from gtp_fx.types.images import separate_images
from gtp_fx.types.rules.registry import NEEDS_ALL, Call, NoRule, Output, RuleResult, TypeList, find

assert _rules


Edge = tuple[fx.Node, fx.Node]
"""A node, and one of its operands."""

TOKENS = "gtp_tokens"
"""Meta key of an argument [B, N, C], or of rows, that is a stream of tokens: its `TokenAxis`
(`passes/exact/mark_tokens.py`)."""

AS_LEFT = "gtp_as_left"
"""Meta key of the output node: maps of tokens are returned as they are left (`passes/exact/mark_outputs.py`)."""


@dataclass(frozen=True)
class Typing:
    """Result of the walk: a `WholeTyping` or a `SiteTyping`. This base is for readers to whom both are the same.

    types: the type of each node's value as its users see it; for a site, that after it.
    results: each rule's result, for the nodes that have tensors.
    """

    graph: fx.Graph
    types: Mapping[fx.Node, Output]
    results: Mapping[fx.Node, RuleResult]

    def type(self, node: fx.Node) -> TensorType:
        """Return the type of a node that is a single tensor. Raises TypeError where it isn't one."""
        found = self.types.get(node)
        if not isinstance(found, tuple):
            raise TypeError(f"{node.name} is not a single tensor")
        return found

    def is_tensor(self, node: fx.Node) -> bool:
        """Return whether a node is a single tensor."""
        return isinstance(self.types.get(node), tuple)


TypeOf = Callable[[fx.Node], TensorType]
"""Returns the type of a node that is a single tensor."""


def type_of_copies(typing: Typing, at: Mapping[fx.Node, fx.Node]) -> TypeOf:
    """Return what tells the type of a node's copy. at: each node's copy."""
    origin = {copy: node for node, copy in at.items()}
    return lambda copy: typing.type(origin[copy])


@dataclass(frozen=True)
class WholeTyping(Typing):
    """Of a graph in which no token leaves."""


@dataclass(frozen=True)
class SiteTyping(Typing):
    """Of a graph in which tokens leave at sites; at none of none.

    images: size of the batch dimension of each stream with a site. whole_edges: as they were given.
    """

    images: Mapping[Grid, int]
    whole_edges: frozenset[Edge] = frozenset()


def infer_types(graph: fx.Graph) -> WholeTyping:
    """Types for every node of `graph`, which need `meta["val"]` with their shapes."""
    types, results, _ = _walk(graph)
    return WholeTyping(graph, types, results)


def infer_with_sites(
    graph: fx.Graph,
    sites: frozenset[fx.Node],
    ends: frozenset[fx.Node] = frozenset(),
    whole_edges: frozenset[Edge] = frozenset(),
) -> SiteTyping:
    """The same with the stream one level shorter after each node of `sites`, and whole after `ends`.

    whole_edges: readers that ask for an operand with every token in place, whatever their rule could do without.
    Sites must be tensors with a token axis.
    """
    return SiteTyping(graph, *_walk(graph, sites, ends, whole_edges), whole_edges)


def _walk(
    graph: fx.Graph,
    sites: frozenset[fx.Node] = frozenset(),
    ends: frozenset[fx.Node] = frozenset(),
    whole_edges: frozenset[Edge] = frozenset(),
) -> tuple[dict[fx.Node, Output], dict[fx.Node, RuleResult], dict[Grid, int]]:
    """Return types, results and images, as `Typing` and `SiteTyping` have them."""
    read_whole: dict[fx.Node, list[fx.Node]] = {}
    for reader, operand in whole_edges:
        read_whole.setdefault(reader, []).append(operand)
    types: dict[fx.Node, Output] = {}
    results: dict[fx.Node, RuleResult] = {}
    images: dict[Grid, int] = {}
    for node in graph.nodes:
        # A reader of whole edges gets its answer as if those operands had all tokens.
        wanted = {operand: whole(types[operand]) for operand in read_whole.get(node, ())}  # type: ignore[arg-type]
        answer = _answer(node, {**types, **wanted} if wanted else types)
        if answer is None:
            types[node] = None
            continue
        results[node] = answer
        types[node] = answer.output
        # The rule answers for the value itself; its users see it after the site.
        if node in sites:
            assert isinstance(answer.output, tuple)
            batch, *others = map(_one_shorter, answer.output)
            types[node] = (as_images(batch), *others)  # the dimension of what says which tokens each image keeps
            images |= {axis.domain.grid: whole_size(answer.output[0]) for axis in token_axes(answer.output)}
        if node in ends:
            assert isinstance(answer.output, tuple)
            types[node] = whole(answer.output)
    return types, results, images


def whole(tensor_type: TensorType) -> TensorType:
    """Return the type with every token back in place."""
    return tuple(_map_axes(dim, lambda axis: axis.at(0)) for dim in tensor_type)


def tokens_dim(tensor_type: TensorType) -> int | None:
    """Return the dimension that runs over each image's own tokens and nothing else; None where there is none such.

    Images have a dimension of their own then, and no other dimension runs over tokens.
    """
    dims = [number for number, dim in enumerate(tensor_type) if token_axes((dim,))]
    images = [dim for dim in tensor_type if len(dim) == 1 and holds_images(dim)]
    return dims[0] if len(dims) == 1 and token_axis(tensor_type[dims[0]]) is not None and len(images) == 1 else None


def _returned_as_left(tensor_type: TensorType) -> TensorType:
    """Return the type in which a value is returned that may have fewer tokens; whole where it can't be told which."""
    return whole(tensor_type) if tokens_dim(tensor_type) is None else tensor_type


def _answer(node: fx.Node, types: dict[fx.Node, Output]) -> RuleResult | None:
    """Return a node's answer: its rule's, or a barrier's where it has none; None for a value without tensors."""
    value = node.meta.get("val")
    if node.op == "output":
        tensors = [n for n in node.all_input_nodes if isinstance(types.get(n), tuple)]
        returned = _returned_as_left if node.meta.get(AS_LEFT) else whole
        return RuleResult(None, {n: returned(types[n]) for n in tensors}, prefix_operands=NEEDS_ALL)  # type: ignore[arg-type]
    if is_input(node):
        return RuleResult(_input_type(node)) if isinstance(value, torch.Tensor) else None
    if not isinstance(value, torch.Tensor | list | tuple):
        return None
    call = Call(node, types)
    if TOKENS in node.meta:
        return RuleResult(_input_type(node), _whole_operands(call), prefix_operands=NEEDS_ALL)
    rule = find(node.target)
    if rule is None:
        return _barrier(call, "gtp_fx has no rule for this operator (docs/extending.md says how to add one)")
    try:
        answer = separate_images(rule(call), call)
    except NoRule as reason:
        return _with_everything_back(call, str(reason))
    if FRAMES in node.meta and isinstance(answer.output, tuple):
        answer = replace(answer, output=separate_frames(answer.output, node.name, node.meta[FRAMES]))
    if answer.barrier:
        return replace(answer, operands=_whole_operands(call), prefix_operands=NEEDS_ALL)
    return answer


def _input_type(node: fx.Node) -> Output:
    """Return the type of an input: without token axes, unless it is marked as tokens."""
    kind = _plain_value(node.meta["val"])
    if TOKENS not in node.meta:
        return kind
    images, _, channels = node.meta["val"].shape
    return as_images((Plain(images),)), (node.meta[TOKENS],), (Plain(channels),)


def _with_everything_back(call: Call, reason: str) -> RuleResult:
    """Answer for a node whose rule couldn't.

    With whole inputs the rule may answer, where tokens had been removed from them. Otherwise the node is a barrier.
    """
    whole_operands = _whole_operands(call)
    if all(call.types[node] == kind for node, kind in whole_operands.items()):
        return _barrier(call, reason)
    rule = find(call.node.target)
    assert rule is not None
    try:
        again = Call(call.node, {**call.types, **whole_operands})
        answer = separate_images(rule(again), again)
    except NoRule as second:
        return _barrier(call, str(second))
    return replace(answer, operands=whole_operands, repair=None, prefix_operands=NEEDS_ALL, barrier=reason)


def _barrier(call: Call, reason: str) -> RuleResult:
    """Answer for what can't be followed: inputs must be whole, and nothing is claimed about the output."""
    return RuleResult(
        _plain_value(call.node.meta["val"]), _whole_operands(call), prefix_operands=NEEDS_ALL, barrier=reason
    )


def _whole_operands(call: Call) -> dict[fx.Node, TensorType]:
    """Return the whole type of each operand that is a tensor."""
    found = {node: call.types[node] for node in call.node.all_input_nodes}
    return {node: whole(kind) for node, kind in found.items() if isinstance(kind, tuple)}


def _plain_value(value: object) -> Output:
    """Return the type of a value without any token axis."""
    if isinstance(value, torch.Tensor):
        return plain(*value.shape)
    if isinstance(value, list | tuple):
        return TypeList(tuple(plain(*v.shape) for v in value if isinstance(v, torch.Tensor)))
    return None


def _one_shorter(dim: Dim) -> Dim:
    return _map_axes(dim, lambda axis: axis.at(axis.domain.level + 1))


def _map_axes(dim: Dim, change) -> Dim:  # type: ignore[no-untyped-def]
    return tuple(change(factor) if isinstance(factor, TokenAxis) else factor for factor in dim)


def levels(tensor_type: TensorType) -> set[int]:
    """Return the levels of the token axes in a type."""
    return {axis.domain.level for axis in token_axes(tensor_type)}
