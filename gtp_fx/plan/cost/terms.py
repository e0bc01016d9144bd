"""A typed graph as terms: pieces of work, each a function of the numbers of tokens that remain.

The same terms serve both currencies, FLOPs and seconds: a term says what is done (`Work`), not what that costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph.operators import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from gtp_fx.graph.symbols import at_batch
from gtp_fx.plan.cost.count import node_flops
from gtp_fx.plan.cost.formulas import Sizes, formula_of
from gtp_fx.plan.cost.fusion import Group, fused_groups
from gtp_fx.targets.work import Work
from gtp_fx.types.axes import Counts, Dim, TensorType, TokenAxis, TokenDomain, token_axes
from gtp_fx.types.infer import Typing

_ATTENTION = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class Term:
    """A piece of work that depends on some token counts.

    domains: the shortened domains whose counts `works` reads.
    works: returns the works, from token counts.
    site: position of the site that the work belongs to, where it is done only if tokens are removed there; else None.
    first: the work is done only at the first site of the stream that removes tokens.
    node: the node whose work it is, or for which it is done; None for a site's own work.
    """

    domains: frozenset[TokenDomain]
    works: Callable[[Counts], list[Work]]
    site: int | None = None
    first: bool = False
    node: fx.Node | None = None


def graph_terms(typing: Typing, batch: int) -> Iterator[Term]:
    """Yield the work of the graph's own operators: a term for each product, and one for each group that is fused."""
    for node in typing.graph.nodes:
        if formula_of(node) is None:
            continue
        if not typing.is_tensor(node):  # several results, or a graph of its own: nothing leaves its operands
            work = Work("product", batch * node_flops(node))
            yield Term(frozenset(), lambda _, work=work: [work], node=node)  # type: ignore[misc]
            continue
        kinds = [typing.results[node].output, *typing.results[node].operands.values()]
        works = lambda count, node=node: [node_work(node, typing, count, batch)]  # noqa: E731
        yield Term(domains_of(kinds), works, node=node)
    for group in fused_groups(typing):
        kinds = [*(kind for _, kind in group.reads), *(typing.type(node) for node in group.writes)]
        works = lambda count, group=group: [group_work(group, typing, count, batch)]  # noqa: E731
        yield Term(domains_of(kinds), works, node=group.nodes[0])


def node_work(node: fx.Node, typing: Typing, count: Counts, batch: int) -> Work:
    """Return the work of an operator that has a formula."""
    sizes = _node_sizes(node, typing, count, batch)
    formula = formula_of(node)
    assert formula is not None
    value = node.meta["val"]
    moved = math.prod(sizes.output) + sum(math.prod(shape) for shape in sizes.operands.values())
    work = Work("product", formula(sizes), moved * value.dtype.itemsize, dtype=str(value.dtype).removeprefix("torch."))
    if node.target is _ATTENTION:
        return replace(work, kind="attention", rows=sizes(0)[-2], tokens=sizes(1)[-2], batch=math.prod(sizes(0)[:-2]))
    if node.target in CONVOLUTIONS:
        channels, per_group = sizes(1)[0], sizes(1)[1]
        if per_group == 1:  # depthwise: bound by memory
            return replace(work, kind="stream")
        return replace(work, kind="convolution", rows=math.prod(sizes.output) // channels, columns=channels)
    if node.target in TRANSPOSED_CONVOLUTIONS:
        rows = math.prod(sizes(0)) // sizes(1)[0]
        return replace(work, kind="convolution", rows=rows, columns=math.prod(sizes(1)[1:]))
    if node.target is aten.linear.default:
        return replace(work, rows=math.prod(sizes.output[:-1]), columns=sizes.output[-1])
    if len(sizes.output) < 2:
        return work
    return replace(work, rows=sizes.output[-2], columns=sizes.output[-1], batch=math.prod(sizes.output[:-2]))


def group_work(group: Group, typing: Typing, count: Counts, batch: int) -> Work:
    """Return the work of a fused group: the memory that it reads and writes."""
    moved: Any = 0
    for node, kind in group.reads:
        moved = moved + math.prod(sizes_of(kind, count, batch)) * node.meta["val"].dtype.itemsize
    for node in group.writes:
        moved = moved + math.prod(sizes_of(typing.type(node), count, batch)) * node.meta["val"].dtype.itemsize
    return Work("stream", bytes=moved)


def sizes_of(kind: TensorType, count: Counts, batch: int) -> list[Any]:
    """Return the size of every dimension of a type, ints or arrays as `count` returns."""
    return [size_of(dim, count, batch) for dim in kind]


def size_of(dim: Dim, count: Counts, batch: int) -> Any:
    """Return the size of one dimension of a type."""
    return math.prod(
        factor.prefix + count(factor.domain) + factor.suffix
        if isinstance(factor, TokenAxis)
        else at_batch(factor.whole_size, batch)
        for factor in dim
    )


def _node_sizes(node: fx.Node, typing: Typing, count: Counts, batch: int) -> Sizes:
    answer = typing.results[node]
    operands = {operand: sizes_of(kind, count, batch) for operand, kind in answer.operands.items()}
    for operand in node.all_input_nodes:
        if operand not in operands and typing.is_tensor(operand):
            operands[operand] = sizes_of(typing.type(operand), count, batch)
    assert isinstance(answer.output, tuple)
    return Sizes(node, operands, sizes_of(answer.output, count, batch))


def domains_of(kinds: list[Any]) -> frozenset[TokenDomain]:
    """Return the shortened domains that some types run over."""
    found = (axis.domain for kind in kinds if isinstance(kind, tuple) for axis in token_axes(kind))
    return frozenset(domain for domain in found if domain.level)
