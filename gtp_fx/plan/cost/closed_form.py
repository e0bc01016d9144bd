"""FLOPs of every schedule of a graph, without building any rewritten graph.

The graph is typed with a site after every block that can have one. Each operator's formula is applied to sizes in which
a token count is an array of every possible count, so one evaluation gives all its costs. Pricing a schedule then takes
one lookup per site (`gtp_fx.plan.cost.chains`), which is a matter of microseconds.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import fx

from gtp_fx.analysis.branches import Branch
from gtp_fx.analysis.resting import Rest
from gtp_fx.graph.symbols import per_image
from gtp_fx.plan.cost.chains import CostModel, Numbers, cost_model
from gtp_fx.plan.cost.formulas import formula_of
from gtp_fx.plan.cost.site_terms import terms_of
from gtp_fx.plan.cost.terms import node_work
from gtp_fx.plan.site import BranchCost, RestCost, Site
from gtp_fx.strategies.protocol import Strategy
from gtp_fx.targets.work import Work
from gtp_fx.types.axes import Plain, whole_count, whole_size
from gtp_fx.types.infer import SiteTyping, WholeTyping


def flops_model(
    typing: SiteTyping, sites: tuple[Site, ...], strategy: Strategy, original: int, batch: int = 1
) -> CostModel:
    """Return the FLOPs of every schedule over `sites`, with `batch` images in each symbolic batch.

    typing: types of the graph with a site after each of `sites` at which tokens are removed.
    original: FLOPs of the original graph, which ratios refer to.
    """
    terms = terms_of(typing, sites, strategy, batch)
    return cost_model(sites, terms, flops_of, _branch_flops, original, np.int64)


def flops_of(works: list[Work]) -> Any:
    """Return the summed FLOPs of some works, an int or an array as their amounts are."""
    return sum(work.flops for work in works)


def _branch_flops(site: Site) -> Numbers:
    """Return [tokens + 1] the change in FLOPs by the number of tokens kept in each window."""
    assert site.branch is not None
    tokens = site.branch.tokens
    return np.array([site.branch.change(tokens - kept) for kept in range(tokens + 1)], np.int64)


def branch_cost(
    branch: Branch, typing: WholeTyping, heads: int, strategy: Strategy, beside_rests: bool = False
) -> BranchCost:
    """Return the FLOPs of a branch, from its nodes' formulas; each is proportional to the number of tokens.

    typing: types with every token in place. heads: of the attention whose scores rank the tokens. beside_rests: whether
    windows may rest in other blocks; then tokens are ranked as windows are, and attention stays as it is.
    """
    images = per_image(math.prod(f.whole_size for f in branch.region[0] if isinstance(f, Plain)))
    features = [whole_size(typing.type(part.result)[-1]) for part in branch.parts]
    recovered = sum(features) if strategy.recovers_branches else 0
    parts = [_token_wise_flops(node, typing) for node in branch.inside]
    whole, per_token = (sum(column) for column in zip(*parts, strict=True))
    keys = math.prod(branch.cells) if branch.cells else branch.attended
    attentions = images * branch.attentions
    by_activity = beside_rests and branch.stream is not None
    scoring = 0
    if not by_activity:
        scoring = int(flops_of(strategy.scoring_works(heads, branch.attended, keys, attentions, "float32")))
    sizes = (images, branch.windows, branch.tokens, branch.others)
    return BranchCost(whole, per_token, *sizes, features[0], recovered, scoring, by_activity)


def rest_cost(rest: Rest, typing: WholeTyping, strategy: Strategy) -> RestCost:
    """Return the FLOPs of a block whose windows may rest, from its nodes' formulas.

    typing: types with every token in place.
    """
    images = per_image(math.prod(f.whole_size for f in rest.rows[0] if isinstance(f, Plain)))
    flops = {n: int(node_work(n, typing, whole_count, batch=1).flops) for n in rest.inside if formula_of(n) is not None}
    each = sum(whole * rest.share(node) for node, whole in flops.items()) / images
    keys = strategy.rest_keys
    cells = sum(whole * rest.coarse_share(n, keys) for n, whole in flops.items()) / images if strategy.rest_share else 0
    patches, features = whole_size(rest.rows[1]), whole_size(typing.type(rest.stream)[-1])
    return RestCost(int(each), int(cells), rest.whole, images, patches, features)


def _token_wise_flops(node: fx.Node, typing: WholeTyping) -> tuple[int, int]:
    """Return the FLOPs of a token-wise node for all tokens, and for one.

    All dimensions of its result but the last are tokens or images.
    """
    if formula_of(node) is None:
        return 0, 0
    flops = int(node_work(node, typing, whole_count, batch=1).flops)
    return flops, flops // math.prod(per_image(whole_size(dim)) for dim in typing.type(node)[:-1])
