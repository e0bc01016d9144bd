"""The work of a graph with sites: that of its own operators, and what sites and recoveries add to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.analysis.own_queries import own_queries
from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.graph.operators import MATRIX_PRODUCTS
from gtp_fx.graph.symbols import at_batch
from gtp_fx.plan.cost.formulas import formula_of
from gtp_fx.plan.cost.maps import map_works
from gtp_fx.plan.cost.terms import Term, domains_of, graph_terms, node_work, size_of, sizes_of
from gtp_fx.plan.site import Site
from gtp_fx.strategies.protocol import Strategy
from gtp_fx.strategies.sites import SiteShape
from gtp_fx.targets.work import Work
from gtp_fx.types.axes import Counts, Dim, TensorType, TokenDomain, token_axes
from gtp_fx.types.coercions import Coercions, find_coercions
from gtp_fx.types.grids import Grid
from gtp_fx.types.infer import SiteTyping
from gtp_fx.types.rules.registry import WEIGHS

_ATTENTION = aten.scaled_dot_product_attention.default


def terms_of(
    typing: SiteTyping, sites: tuple[Site, ...], strategy: Strategy, batch: int, kernels: bool = False
) -> list[Term]:
    """Return all work of a graph typed with sites at which tokens are removed; branches are priced separately.

    batch: images of a run where the batch is symbolic.
    kernels: price sites as GTP's Triton kernels run, where there are some. FLOPs always count the plain operators.
    """
    at = {(site.domain.grid, site.domain.level): place for place, site in enumerate(sites) if site.branch is None}
    terms = [*graph_terms(typing, batch)]
    coercions = find_coercions(typing)
    terms += _recovery_terms(coercions, at, batch)
    if strategy.recovers_by_attention:
        terms += _map_terms(typing, sites, [at[level] for level in coercions.levels_recovered if level in at], batch)
    # A site whose token scales nothing reads later doesn't compute them.
    readers = _key_types(typing) if strategy.reads_scales else []
    readers += _pooled_types(typing) if strategy.weighted_pooling else []
    read = {axis.domain for kind in readers for axis in token_axes(kind)}
    for (grid, level), place in at.items():
        site = sites[place]
        scales_read = any(d.grid == grid and d.level > level for d in read)
        terms.append(_site_term(site, place, strategy, scales_read, batch, kernels))
        works = strategy.start_works(grid.shape, site.channels, at_batch(site.images, batch), site.dtype, kernels)
        terms.append(Term(frozenset(), lambda _, works=works: works, place, first=True))  # type: ignore[misc]
    if kernels and strategy.reads_scales:
        terms += _scale_terms(typing, batch)
    return terms


def _site_term(site: Site, place: int, strategy: Strategy, scales_read: bool, batch: int, kernels: bool) -> Term:
    """Make the term of a site's own work. scales_read: a later attention or pooling reads the token scales."""
    after = site.domain.at(site.domain.level + 1)

    def works(count: Counts) -> list[Work]:
        images = at_batch(site.images, batch)
        sizes = (count(site.domain), count(after), site.others, site.channels, site.heads, images, site.dtype)
        shape = SiteShape(*sizes, site.key_features, site.axis.prefix, kernels)
        return strategy.site_works(shape, scales_read)

    return Term(frozenset(d for d in (site.domain, after) if d.level), works, place)


def _recovery_terms(coercions: Coercions, at: Mapping[tuple[Grid, int], int], batch: int) -> list[Term]:
    """Return the work of recovering tokens, where a node needs tokens that were removed.

    Recovering costs one product for each site passed: shares [P, K] times K rows. Equal recoveries are done once.
    Taking the rows of the remaining tokens from an older value costs no FLOPs and little traffic, and isn't counted.
    at: position of each site, by its grid and level.
    """
    terms: dict[Any, Term] = {}
    for coercion in coercions.found:
        kind = list(coercion.kind)
        itemsize = coercion.operand.meta["val"].dtype.itemsize
        for i, step in enumerate(coercion.steps):
            domain = step.axis.domain
            if step.recovers:
                # One term for each level climbed; `kind` holds the operand's type with the steps before this one done.
                others = tuple(d for dim, d in enumerate(kind) if dim not in (step.dim, coercion.images))
                for level in range(domain.level, step.level, -1):
                    key = (coercion.operand, coercion.lead, coercion.steps[:i], step.dim, level)
                    levels = (domain.at(level), domain.at(level - 1))
                    works = _recovery_works(*levels, kind[coercion.images], others, itemsize, batch)
                    domains = domains_of([others]) | {d for d in levels if d.level}
                    terms[key] = Term(domains, works, at.get((domain.grid, level - 1)), node=coercion.node)
            kind[step.dim] = (step.axis.at(step.level),)
    return list(terms.values())


def _recovery_works(
    after: TokenDomain, before: TokenDomain, images: Dim, others: TensorType, itemsize: int, batch: int
) -> Callable[[Counts], list[Work]]:
    """Make the work of recovering the tokens of `before` from those of `after`, the counts before and after one site.

    images: the dimension of images. others: all dimensions but tokens and images.
    """

    def works(count: Counts) -> list[Work]:
        kept, all_ = count(after), count(before)
        each = math.prod(sizes_of(others, count, batch))
        number = size_of(images, count, batch)
        flops = 2 * number * (all_ - kept) * kept * each
        return [Work("gather", flops, number * each * (kept + 2 * all_) * itemsize, launches=2)]

    return works


def _map_terms(typing: SiteTyping, sites: tuple[Site, ...], places: list[int], batch: int) -> Iterator[Term]:
    """Yield the work of the maps by which the tokens of some sites are recovered. places: positions of those."""
    blocks = {block.index: block for block in typed_graph(typing.graph).blocks}

    def products(nodes: Sequence[fx.Node], count: Counts) -> dict[fx.Node, Work]:
        return {node: node_work(node, typing, count, batch) for node in nodes if formula_of(node) is not None}

    for place in places:
        site, parts = sites[place], own_queries(blocks[sites[place].block])
        assert parts is not None, "the strategy refuses other blocks"
        works = lambda count, site=site, parts=parts: map_works(site, parts, products, count, batch)  # noqa: E731
        around = (site.domain, site.domain.at(site.domain.level + 1))
        yield Term(frozenset(domain for domain in around if domain.level), works, place)


def _scale_terms(typing: SiteTyping, batch: int) -> Iterator[Term]:
    """Yield what token scales add to attention over a shortened stream.

    Queries and keys are copied with one more feature, which carries the scale.
    """
    for node in typing.graph.nodes:
        if node.target is _ATTENTION:
            kinds = [typing.results[node].operands[node.args[i]] for i in (0, 1)]
            if domains_of(kinds[1:]):
                size = node.meta["val"].dtype.itemsize

                def works(count: Counts, kinds: list[TensorType] = kinds, size: int = size) -> list[Work]:
                    moved: Any = sum(math.prod(sizes_of(kind, count, batch)) for kind in kinds)
                    return [Work("stream", bytes=2 * size * moved, launches=2)]

                yield Term(domains_of(kinds), works, node=node)


def _pooled_types(typing: SiteTyping) -> list[TensorType]:
    """Return the types that average pooling runs over."""
    means = [n for n in typing.graph.nodes if n.target is aten.mean.dim]
    return [typing.results[n].operands[n.args[0]] for n in means]


def _key_types(typing: SiteTyping) -> list[TensorType]:
    """Return the types of the token dimensions of every attention's keys."""
    attentions = [n for n in typing.graph.nodes if n.target is _ATTENTION or _is_spelled(n)]
    return [typing.results[n].operands[n.args[1]][-2:-1] for n in attentions]


def _is_spelled(node: fx.Node) -> bool:
    """Return whether a node is the product of map and values in which an attention ends that is spelled out."""
    return WEIGHS in node.meta and node.target in MATRIX_PRODUCTS
