"""FLOPs of every schedule of a graph, without building its graph.

The graph is typed with a site after every block that may have one; each operator's formula, applied to sizes in which the
patches left are arrays of every possible count, gives all its costs at once. A schedule is then priced by looking up
a number a site (`gtp_fx.plan.cost.chains`), in microseconds.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import fx

from gtp_fx.analysis.branches import Branch
from gtp_fx.graph.symbols import per_image
from gtp_fx.plan.cost.chains import CostModel, Numbers, cost_model
from gtp_fx.plan.cost.formulas import find
from gtp_fx.plan.cost.terms import node_work, terms_of
from gtp_fx.plan.site import BranchCost, Site
from gtp_fx.strategies.protocol import Strategy
from gtp_fx.targets.work import Work
from gtp_fx.types.axes import Plain, whole_count, whole_size
from gtp_fx.types.infer import SiteTyping, WholeTyping


def flops_model(typing: SiteTyping, sites: tuple[Site, ...], strategy: Strategy, original: int) -> CostModel:
    """The closed form of a graph, typed with a site after each of those at which tokens leave, per image where the batch is
    symbolic. original: FLOPs of what ratios are taken of."""
    terms = terms_of(typing, sites, strategy, batch=1)
    return cost_model(sites, terms, flops_of, _branch_flops, original, np.int64)


def flops_of(works: list[Work]) -> Any:
    return sum(work.flops for work in works)


def _branch_flops(site: Site) -> Numbers:
    assert site.branch is not None
    tokens = site.branch.tokens
    return np.array([site.branch.change(tokens - kept) for kept in range(tokens + 1)], np.int64)


def branch_cost(branch: Branch, typing: WholeTyping, heads: int, strategy: Strategy) -> BranchCost:
    """FLOPs of a branch from its nodes' formulas: each is so many times the tokens."""
    images = per_image(math.prod(f.whole_size for f in branch.region[0] if isinstance(f, Plain)))
    features = whole_size(typing.type(branch.result)[-1])
    parts = [_token_wise_flops(node, typing) for node in branch.inside]
    whole, per_token = (sum(column) for column in zip(*parts, strict=True))
    keys = math.prod(branch.cells) if branch.cells else branch.tokens
    scoring = int(flops_of(strategy.scoring_works(heads, branch.tokens, keys, images * branch.windows, "float32")))
    return BranchCost(whole, per_token, images, branch.windows, branch.tokens, features, scoring)


def _token_wise_flops(node: fx.Node, typing: WholeTyping) -> tuple[int, int]:
    """Of all tokens, and of one: all dimensions but the last are tokens (and images)."""
    if find(node.target) is None:
        return 0, 0
    flops = int(node_work(node, typing, whole_count, batch=1).flops)
    return flops, flops // math.prod(per_image(whole_size(dim)) for dim in typing.type(node)[:-1])
