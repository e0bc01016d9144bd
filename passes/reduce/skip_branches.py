"""Approximate: let tokens skip a branch. The stream keeps its grid; some tokens of each window go through the branch alone.

For each block of the plan that is placed so:
  1. its attention also scores its tokens, window by window;
  2. the branch's entries are arranged by window, and the kept tokens taken out of each, as many everywhere;
  3. the branch's nodes run on those;
  4. the others get their neighbours' results (or, as the strategy says, none), and all is arranged as it was.
"""

from __future__ import annotations

import operator
from dataclasses import replace

from torch import fx
from torch.ops import aten, gtp_fx  # type: ignore[import-not-found]

from gtp_fx.analysis.blocks import AttentionBlock
from gtp_fx.analysis.branches import Branch
from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.graph import edit
from gtp_fx.graph.symbols import is_symbolic, shape_of
from gtp_fx.plan.plan import Plan
from gtp_fx.strategies.protocol import Attention, Emit, Strategy
from gtp_fx.types.axes import Plain, whole_size
from gtp_fx.types.infer import WholeTyping, infer_types
from gtp_fx.types.layouts import by_window, convert, grid_of, image_layout, made_from

_ROWS, _IMAGES = 1, 0
"""In the layout by window, [images and windows, tokens, features]."""
_FAR = 1 << 20
"""Farther than any two patches are apart."""


def skip_branches(gm: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """A copy of `gm`, whose blocks are marked, in which the plan's tokens skip the plan's branches."""
    blocks = typed_graph(gm.graph).blocks
    gm, copies = edit.copy_with_nodes(gm)
    typing = infer_types(gm.graph)
    for block in [block.copied(copies) for block in blocks]:
        skipping = plan.skipping.get(block.index)
        if block.branch is None or skipping is None:
            continue
        scores = _scored(gm.graph, block, block.branch, plan.strategy, typing)
        chosen = _choose(gm.graph, scores, block.branch, skipping, plan.strategy)
        _insert(gm.graph, block.branch, chosen, typing)
    return edit.finish(gm)


def _choose(
    graph: fx.Graph, scores: fx.Node, branch: Branch, skipping: int, strategy: Strategy
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """kept [R, K] and left [R, P] of each of R images and windows, and shares [R, P, K], after the branch.

    scores: of type `branch.scores`.
    """

    call = edit.Emitter(graph, like=branch.result)

    with graph.inserting_before(branch.result.next):
        scores = _by_window(call, scores, branch)
        if _is_padded(branch):
            scores = _padding_first(call, scores, branch)
        split = call(gtp_fx.select.default, scores, skipping)
        kept, left = call(operator.getitem, split, 0), call(operator.getitem, split, 1)
        return kept, left, _shares(call, kept, left, branch, strategy, like=scores)


def _insert(graph: fx.Graph, branch: Branch, chosen: tuple[fx.Node, fx.Node, fx.Node], typing: WholeTyping) -> None:
    """Put the branch of the kept tokens in the place of the whole, after what was `chosen`."""
    kept, left, shares = chosen
    before = next(node for node in graph.nodes if node in branch.inside)
    after = branch.result

    call = edit.Emitter(graph, like=before)

    with graph.inserting_before(shares.next):
        instead: dict[fx.Node, fx.Node] = {}
        for entry in branch.entries:
            kind = typing.type(entry)
            rows = convert(call, entry, kind, (*branch.region, kind[-1]))
            instead[entry] = call(gtp_fx.take_tokens.default, rows, kept, _IMAGES, _ROWS, 0, 0)
        for node in branch.inside:
            copy = graph.node_copy(node, lambda n: instead.get(n, n))
            copy.meta = {key: node.meta[key] for key in edit.META_KEYS if key in node.meta}
            instead[node] = copy
        result = call(gtp_fx.recover.default, instead[after], shares, kept, left, _IMAGES, _ROWS, 0, 0)
        kind = typing.type(after)
        arranged = convert(call, result, (*branch.region, kind[-1]), kind)
    after.replace_all_uses_with(arranged)


def _scored(graph: fx.Graph, block: AttentionBlock, branch: Branch, strategy: Strategy, typing: WholeTyping) -> fx.Node:
    """Replace the block's attention by one that scores its tokens: [images and windows, tokens] in its own order."""
    attention = block.attention
    was = Attention.of(attention)

    call = edit.Emitter(graph, like=attention)

    order = list(branch.order)
    plain = order == [0, 1, 2, 3]
    with graph.inserting_before(attention):
        q, k, v = (_heads_first(call, x, branch, typing) for x in (was.q, was.k, was.v))
        operands = replace(was, q=q, k=k, v=v)
        if branch.cells:
            output, scores = strategy.attend_cells(call, operands, block.axis.domain.grid.shape, branch.cells)
        else:
            output, scores = strategy.attend(call, operands, block.axis, True)
        if not plain:
            shape = shape_of(attention)
            sizes = [-1 if is_symbolic(shape[d]) else shape[d] for d in order]
            output = call(aten.reshape.default, output, sizes)
            output = call(aten.permute.default, output, [order.index(d) for d in range(len(order))])
    attention.replace_all_uses_with(output)
    graph.erase_node(attention)
    return scores


def _heads_first(call: Emit, x: fx.Node, branch: Branch, typing: WholeTyping) -> fx.Node:
    """[images, windows, heads, tokens, features] in any order -> [images * windows, heads, tokens, features]."""
    order = branch.order
    if order == (0, 1, 2, 3):
        return x
    sizes = [whole_size(typing.type(x)[d]) for d in order[-3:]]
    return call(aten.reshape.default, call(aten.permute.default, x, list(order)), [-1, *sizes])


def _by_window(call: Emit, scores: fx.Node, branch: Branch) -> fx.Node:
    """`scores`, of type `branch.scores`, in the region's layout: row by row in each window."""
    feature = (Plain(1),)
    if branch.scores == branch.region:
        return scores
    column = call(aten.unsqueeze.default, scores, 2)
    column = convert(call, column, (*branch.scores, feature), (*branch.region, feature))
    return call(aten.squeeze.dim, column, 2)


def _padding_first(call: Emit, scores: fx.Node, branch: Branch) -> fx.Node:
    """Scores are 0 or more; what a window has of padding gets -1, and skips before any patch does."""
    inside = call(aten.ge.Scalar, call(aten.select.int, _places(call, branch, scores), 2, 0), 0)
    by_image = call(aten.reshape.default, scores, [-1, branch.windows, branch.tokens])
    least = call(aten.sub.Scalar, call(aten.zeros_like.default, by_image), 1.0)
    ranked = call(aten.where.self, inside, by_image, least)
    return call(aten.reshape.default, ranked, [-1, branch.tokens])


def _places(call: Emit, branch: Branch, like: fx.Node) -> fx.Node:
    """Rows and columns of an image's tokens by window, [windows, tokens, R]; of padding, far off and negative."""
    image = image_layout(branch.region)
    features = (Plain(len(image) - 1),)
    places = call(gtp_fx.grid_places.default, [whole_size(dim) for dim in image[1:]], like)
    padded = _is_padded(branch)
    if padded:
        places = call(aten.add.Scalar, places, _FAR)  # padding is 0 then
    places = convert(call, places, (*image, features), by_window(branch.region, features))
    return call(aten.sub.Scalar, places, _FAR) if padded else places


def _is_padded(branch: Branch) -> bool:
    return any(grid.inside is not None for grid in made_from(grid_of(branch.region)))


def _shares(call: Emit, kept: fx.Node, left: fx.Node, branch: Branch, strategy: Strategy, like: fx.Node) -> fx.Node:
    """[images and windows, P, K]: of whom each token that skips gets its result."""
    shares = call(gtp_fx.region_shares.default, _places(call, branch, like), kept, left)
    if not strategy.recovers_branches:
        shares = call(aten.zeros_like.default, shares)
    return shares
