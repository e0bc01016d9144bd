"""The work of a map of all tokens that a site had over those that it left (`passes/reduce/map_tokens.py`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import fx

from gtp_fx.analysis.own_queries import OwnQueries
from gtp_fx.graph.symbols import at_batch, shape_of
from gtp_fx.plan.site import Site
from gtp_fx.targets.work import Work
from gtp_fx.types.axes import Counts


def map_works(
    site: Site,
    parts: OwnQueries,
    products: Callable[[Sequence[fx.Node], Counts], dict[fx.Node, Work]],
    count: Counts,
    batch: int,
) -> list[Work]:
    """Return the work of making queries and keys once more, and the shares [P, K] of them.

    parts: what makes the block's, in a graph typed with the site.
    products: returns the works of those nodes that multiply matrices, with other counts than the site's.
    count: counts of the site's tokens. batch: images of a run where the batch is symbolic.
    """
    before, after = site.domain, site.domain.at(site.domain.level + 1)
    entering, left = count(before), count(after)
    images, removed = at_batch(site.images, batch), entering - left
    size = getattr(torch, site.dtype).itemsize
    each = site.channels * size * images
    flops = 2 * images * site.heads * removed * left * site.key_features
    table = images * site.heads * removed * left * size
    # Queries have the type of what is left, and keys of what enters: here it is the other way round.
    of_keys = products(parts.keys, lambda domain: left if domain == before else count(domain))
    return [
        *products(parts.queries, lambda domain: entering if domain == after else count(domain)).values(),
        *(_for_keys(work, node, parts) for node, work in of_keys.items()),
        Work("stream", bytes=2 * each * (entering + left + 2 * site.others), launches=2),  # the norms
        Work("product", flops, table, removed, left, math.prod((images, site.heads)), dtype=site.dtype),
        Work("stream", bytes=2 * table, launches=2),
    ]


def _for_keys(work: Work, node: fx.Node, parts: OwnQueries) -> Work:
    """Return the work of a projection's rows that make keys; all of it where it makes nothing else."""
    rows, features = parts.rows_for_keys.get(node), shape_of(node)[-1]
    return work if rows is None else replace(work, flops=work.flops * rows // features, columns=rows)
