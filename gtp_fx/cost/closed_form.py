"""FLOPs of every schedule of a graph, as one polynomial in token counts.

The graph is typed with a site after every block that may have one; each operator's formula, applied to typed sizes,
is then a polynomial in n_1, n_2, … (the patches left after the first, second, … site), and so is their sum. A
schedule is priced by evaluating it, in microseconds, without building its graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.attention_half import AttentionHalf
from gtp_fx.axes import Dim, Grid, Plain, TensorType, TokenAxis, TokenDomain, token_axes, whole_size
from gtp_fx.branches import Branch
from gtp_fx.coercions import Coercions, find_coercions
from gtp_fx.cost.formulas import Sizes, find
from gtp_fx.cost.formulas import attention as attention_flops
from gtp_fx.infer import Typing
from gtp_fx.sizes import per_image
from gtp_fx.strategies.protocol import SiteShape, Strategy


@dataclass(frozen=True)
class Site:
    """A place where tokens may leave: block number, the domain that they leave, channels and heads of the stream.

    others: tokens of the stream that are no patches and never leave.
    images: how many images one run of the graph takes; 1 where the batch is symbolic, and priced as one.
    branch: where tokens don't leave but skip a branch of the block, what that costs; `domain` is then a window's tokens.
    """

    block: int
    domain: TokenDomain
    others: int
    channels: int
    heads: int
    images: int = 1
    branch: BranchCost | None = None

    @property
    def stream(self) -> object:
        """What shrinks from site to site: the tokens of a grid, or those of one branch alone."""
        return self.domain.grid if self.branch is None else self.block


@dataclass(frozen=True)
class BranchCost:
    """FLOPs of a branch, of one run of the graph.

    whole: with every token. per_token: of one. images: of one run; 1 where the batch is symbolic. windows, tokens: of an image,
    and in each. features: of its result. scoring: what ranking the tokens by this block's own attention adds to it.
    lender: the block whose scores rank them instead, where this one's attention is skipped too and is part of the branch; None
    where they are its own.
    """

    whole: int
    per_token: int
    images: int
    windows: int
    tokens: int
    features: int
    scoring: int
    lender: int | None = None

    def change(self, skipping: int) -> int:
        """What is spent more when `skipping` tokens of each window go around it (less is negative).

        Without what another block's scoring costs, which that block pays where its own tokens skip: see `lent`.
        """
        if not skipping:
            return 0
        kept = self.tokens - skipping
        rows = self.images * self.windows * kept
        return (
            rows * self.per_token
            - self.whole
            + 2 * rows * skipping * self.features
            + (self.scoring if self.lender is None else 0)
        )


@dataclass(frozen=True)
class FlopsModel:
    """FLOPs of each schedule of one graph (per image where the batch is symbolic).

    graph: the polynomial of the graph's own operators; at_site: what each site adds where tokens do leave. Their symbols
    are `symbol_of(domain)`. start: what the strategy spends once on each grid that any token leaves. original: what the ratio
    is taken of. evaluate: (graph, at_site) as numbers, from the patches left after each site.
    """

    graph: Any
    at_site: tuple[Any, ...]
    sites: tuple[Site, ...]
    original: int
    start: Mapping[Grid, int]
    evaluate: Callable[..., tuple[int, tuple[int, ...]]]

    def flops(self, propagated: Sequence[int]) -> int:
        """FLOPs when `propagated[i]` patches leave at site i."""
        leaving = [(site, count) for site, count in zip(self.sites, propagated, strict=True) if site.branch is None]
        graph, at_site = self.evaluate(*patches_left(leaving))
        spent = sum(cost for cost, (_, count) in zip(at_site, leaving, strict=True) if count)
        started = {site.domain.grid for site, count in leaving if count}
        skipped = sum(
            site.branch.change(count)
            for site, count in zip(self.sites, propagated, strict=True)
            if site.branch is not None
        )
        skipped += lent(self.sites, propagated)
        return int(graph + spent + skipped + sum(self.start[grid] for grid in started))

    def ratio(self, propagated: Sequence[int]) -> float:
        return self.flops(propagated) / self.original


def flops_model(
    graph: fx.Graph, typing: Typing, all_sites: tuple[Site, ...], strategy: Strategy, original: int
) -> FlopsModel:
    """The closed form of `graph`, typed with a site after each of those at which tokens leave."""
    sites = tuple(site for site in all_sites if site.branch is None)
    total = sympy.Integer(0)
    for node in graph.nodes:
        formula = find(node.target) if node.op == "call_function" else None
        if formula is not None:
            total += formula(_symbolic_sizes(node, typing))
    total += _recovery_flops(find_coercions(typing))
    readers = [*_key_types(graph, typing), *(_pooled_types(graph, typing) if strategy.weighted_pooling else [])]
    read = {axis.domain for kind in readers for axis in token_axes(kind)}
    at_site = []
    for site in sites:
        told = any(d.grid == site.domain.grid and d.level > site.domain.level for d in read)
        at_site.append(sympy.sympify(site.images * strategy.site_flops(_site_shape(site), told)))
    first = {site.domain.grid: site for site in reversed(sites)}
    start = {grid: site.images * strategy.start_flops(grid.shape, site.channels) for grid, site in first.items()}
    symbols = [symbol_of(site.domain.at(site.domain.level + 1)) for site in sites]
    expressions = (sympy.expand(total), tuple(at_site))
    return FlopsModel(*expressions, all_sites, original, start, sympy.lambdify(symbols, expressions, "math"))


def _recovery_flops(coercions: Coercions) -> Any:
    """Putting tokens back costs a product at each site passed: [P, K] shares by K rows. Equal ones are done once."""
    done: dict[Any, Any] = {}
    for coercion in coercions.found:
        sizes = _sizes(coercion.kind)
        for i, step in enumerate(coercion.steps):
            domain = step.axis.domain
            if step.recovers:
                rest = math.prod(size for dim, size in enumerate(sizes) if dim not in (step.dim, coercion.images))
                for level in range(domain.level, step.level, -1):
                    kept, all_ = symbol_of(domain.at(level)), symbol_of(domain.at(level - 1))
                    key = (coercion.operand, coercion.lead, coercion.steps[:i], step.dim, level)
                    done[key] = 2 * sizes[coercion.images] * (all_ - kept) * kept * rest
            sizes[step.dim] = step.axis.prefix + symbol_of(domain.at(step.level)) + step.axis.suffix
    return sum(done.values(), sympy.Integer(0))


def lent(sites: Sequence[Site], propagated: Sequence[int]) -> int:
    """What blocks spend on scores that only the next one asks for: no token skips there, and some do behind it."""
    branches = {site.block: (site.branch, count) for site, count in zip(sites, propagated, strict=True)}
    lenders = {branch.lender for branch, count in branches.values() if branch is not None and count}
    return sum(b.scoring for block, (b, count) in branches.items() if b is not None and block in lenders and not count)


def branch_cost(
    branch: Branch, typing: Typing, heads: int, strategy: Strategy, attention: AttentionHalf | None = None
) -> BranchCost:
    """FLOPs of a branch from its nodes' formulas: each is so many times the tokens. attention: skipped with it."""
    images = per_image(math.prod(f.whole_size for f in branch.region[0] if isinstance(f, Plain)))
    rows = images * branch.windows * branch.tokens
    features = whole_size(typing.type(branch.result)[-1])
    parts = [_token_wise_flops(node, typing) for node in branch.inside]
    if attention is not None:
        parts += [_token_wise_flops(node, typing) for node in attention.inside]
        products = int(attention_flops(_symbolic_sizes(attention.node, typing)))
        parts.append((products, products // rows))
        if attention.projection is not None:
            linear, fused = attention.projection.linear, attention.projection.fused
            whole, of_one = _token_wise_flops(linear, typing)
            parts.append((whole // fused.parts, of_one // fused.parts) if fused is not None else (whole, of_one))
        features += whole_size(typing.type(attention.result)[-1])
    whole, per_token = (sum(column) for column in zip(*parts, strict=True))
    keys = math.prod(branch.cells) if branch.cells else branch.tokens
    scoring = int(images * branch.windows * strategy.scoring_flops(heads, branch.tokens, keys))
    lender = None if attention is None else attention.lender
    return BranchCost(whole, per_token, images, branch.windows, branch.tokens, features, scoring, lender)


def _token_wise_flops(node: fx.Node, typing: Typing) -> tuple[int, int]:
    """Of all tokens, and of one: all dimensions but the last are tokens (and images)."""
    formula = find(node.target)
    if formula is None:
        return 0, 0
    sizes = _symbolic_sizes(node, typing)
    flops = int(formula(sizes))
    return flops, flops // int(math.prod(sizes.output[:-1]))


def patches_left(leaving: Sequence[tuple[Site, int]]) -> list[int]:
    """Patches behind each site, from how many leave there."""
    left = {site.domain.grid: site.domain.whole_count for site, _ in leaving}
    behind = []
    for site, count in leaving:
        left[site.domain.grid] -= count
        behind.append(left[site.domain.grid])
    return behind


def symbol_of(domain: TokenDomain) -> Any:
    """n_k: the patches of a domain; a number at level 0."""
    if domain.level == 0:
        return sympy.Integer(domain.whole_count)
    return sympy.Symbol(f"n_{domain.level}_{domain.grid.birth}", positive=True, integer=True)


def _symbolic_sizes(node: fx.Node, typing: Typing) -> Sizes:
    answer = typing.answers[node]
    operands = {operand: _sizes(kind) for operand, kind in answer.operands.items()}
    for operand in node.all_input_nodes:
        if operand not in operands and typing.is_tensor(operand):
            operands[operand] = _sizes(typing.type(operand))
    assert isinstance(answer.output, tuple)
    return Sizes(node, operands, _sizes(answer.output))


def _sizes(kind: TensorType) -> list[Any]:
    return [_size(dim) for dim in kind]


def _size(dim: Dim) -> Any:
    return math.prod(
        factor.prefix + symbol_of(factor.domain) + factor.suffix
        if isinstance(factor, TokenAxis)
        else per_image(factor.whole_size)
        for factor in dim
    )


def _site_shape(site: Site) -> SiteShape:
    behind = site.domain.at(site.domain.level + 1)
    return SiteShape(symbol_of(site.domain), symbol_of(behind), site.others, site.channels, site.heads)


def _pooled_types(graph: fx.Graph, typing: Typing) -> list[TensorType]:
    means = [n for n in graph.nodes if n.target is aten.mean.dim]
    return [typing.answers[n].operands[n.args[0]] for n in means]


def _key_types(graph: fx.Graph, typing: Typing) -> list[TensorType]:
    attentions = [n for n in graph.nodes if n.target is aten.scaled_dot_product_attention.default]
    return [typing.answers[n].operands[n.args[1]][-2:-1] for n in attentions]
