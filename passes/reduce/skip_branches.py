"""Approximate: let tokens skip a branch. The stream keeps its grid, and only some tokens of each window run the branch.

For each block whose site in the plan is on a branch:
  1. Its attention also scores its tokens, window by window; beside blocks whose windows may rest, how far tokens are
     from their window's mean does, and attention stays as it is.
  2. The branch's entries are arranged by window, and the kept tokens are taken from each window, equally many in all.
     Tokens that are no patches are taken along, or go through the branch on their own where no window has them.
  3. The branch's nodes run on these tokens.
  4. Skipped tokens get their neighbours' results, a share of their window's mean, or none, as the strategy says. All
     tokens return to their places.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx
from torch.ops import aten, gtp_fx  # type: ignore[import-not-found]

from gtp_fx.analysis.branch_layouts import patches_at, patches_of
from gtp_fx.analysis.branch_parts import Part, with_fewer_dimensions
from gtp_fx.analysis.branches import Branch
from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.graph import edit
from gtp_fx.graph.symbols import shape_of
from gtp_fx.passes.reduce.skip_scores import arranged_by_window, by_activity, by_attention, is_padded, padding_first
from gtp_fx.plan.plan import Plan
from gtp_fx.strategies.protocol import Strategy
from gtp_fx.strategies.sites import Emit
from gtp_fx.types.axes import Plain, TensorType, whole_size
from gtp_fx.types.infer import TypeOf, type_of_copies
from gtp_fx.types.layouts import by_window, convert, image_layout

_ROWS, _IMAGES = 1, 0
"""Dimensions of the layout by window, [images and windows, tokens, features]."""
_RANK = 3
"""Dimensions of that layout."""
_FAR = 1 << 16
"""Distance larger than that of any two patches."""


def skip_branches(gm: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """Return a copy of `gm`, whose blocks are marked, in which the plan's tokens skip the plan's branches."""
    typed = typed_graph(gm.graph)
    blocks, typing = typed.blocks, typed.whole
    gm, copies = edit.copy_with_nodes(gm)
    type_of = type_of_copies(typing, copies)
    for block in [block.copied(copies) for block in blocks]:
        skipping = plan.skipping.get(block.index)
        if block.branch is None or skipping is None:
            continue
        scores = None
        if block.index not in plan.by_activity:
            scores = by_attention(gm.graph, block, block.branch, plan.strategy)
        chosen = _choose(gm.graph, scores, block.branch, skipping, type_of)
        for part in block.branch.parts:
            _insert(gm.graph, part, block.branch, chosen, plan.strategy, type_of)
    return edit.finish(gm, draws=False)


@dataclass(frozen=True)
class Chosen:
    """Which tokens skip a branch, as nodes.

    kept [R, K] and skipped [R, P] are indices into the tokens of each of R windows of all images. places: coordinates
    of an image's tokens by window.
    """

    kept: fx.Node
    skipped: fx.Node
    places: fx.Node


def _choose(graph: fx.Graph, scores: fx.Node | None, branch: Branch, skipping: int, type_of: TypeOf) -> Chosen:
    """Choose the tokens that skip the branch, by lowest score. The nodes are inserted after the branch's first part.

    scores: scores of type `branch.scores`; None where tokens are ranked by how far they are from their window's mean.
    skipping: P, how many tokens of each window skip.
    """
    result = branch.parts[0].result
    call = edit.Emitter(graph, like=result)

    with graph.inserting_before(result.next):
        if scores is None:
            assert branch.stream is not None
            places = _places(call, branch, branch.stream)
            scores = by_activity(call, branch, branch.stream, places, type_of)
        else:
            scores = arranged_by_window(call, scores, branch)
            places = _places(call, branch, scores)
        if is_padded(branch):
            scores = padding_first(call, scores, places, branch)
        split = call(gtp_fx.select.default, scores, skipping)
        return Chosen(call(operator.getitem, split, 0), call(operator.getitem, split, 1), places)


def _insert(graph: fx.Graph, part: Part, branch: Branch, chosen: Chosen, strategy: Strategy, type_of: TypeOf) -> None:
    """Replace a part of the branch by one that runs on the kept tokens alone, inserted after it."""
    kept, skipped = chosen.kept, chosen.skipped
    result = part.result

    call = edit.Emitter(graph, like=part.inside[0])

    with graph.inserting_before(skipped.next if part is branch.parts[0] else result.next):
        before, after = (_apart(graph, call, part, branch, type_of, last) for last in (False, True))
        # Arrange what enters the branch by window, and take the kept tokens.
        replacement: dict[fx.Node, fx.Node] = {}
        for entry in part.entries:
            patches, kind = _patches(call, entry, branch, type_of)
            rows = convert(call, patches, kind, (*branch.rows, kind[-1]))
            replacement[entry] = call(gtp_fx.take_tokens.default, rows, kept, _IMAGES, _ROWS, *branch.around)
        # The branch is token-wise, so its nodes run on these as they are.
        for node in part.inside:
            # A parameter of more dimensions, [1, 1, 1, C], would give them to the tokens.
            for shared in node.all_input_nodes:
                if shared not in replacement and len(shape_of(shared)) > _RANK:
                    replacement[shared] = call(aten.reshape.default, shared, [shape_of(shared)[-1]])
            replacement[node] = copy = _copy(graph, node, replacement)
            copy.args = fx.map_arg(with_fewer_dimensions(node), lambda n: replacement.get(n, n))
        # Fill in the skipped tokens, and return to the layout of the stream.
        if strategy.recovers_branches:
            shares = call(gtp_fx.region_shares.default, chosen.places, kept, skipped)
            at = (_IMAGES, _ROWS, *branch.around)
            filled = call(gtp_fx.recover.default, replacement[result], shares, kept, skipped, *at)
        else:
            among = (chosen.places, kept, skipped, *branch.around, strategy.branch_mean, is_padded(branch))
            filled = call(gtp_fx.idle.default, replacement[result], *among)
        own = type_of(result)
        kind = patches_of(own) if any(branch.apart) else own
        joined = [*before, convert(call, filled, (*branch.rows, kind[-1]), kind), *after]
        arranged = call(aten.cat.default, joined, patches_at(own)) if len(joined) > 1 else joined[0]
    result.replace_all_uses_with(arranged)


def _copy(graph: fx.Graph, node: fx.Node, of: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """Insert a copy of a node that reads other values. of: what to read in the place of which node."""
    copy = graph.node_copy(node, lambda n: of.get(n, n))
    copy.meta = edit.origin_of(node, node.target)
    return copy


def _patches(call: Emit, entry: fx.Node, branch: Branch, type_of: TypeOf) -> tuple[fx.Node, TensorType]:
    """Return an entry without the tokens that go through the branch on their own, and its type."""
    kind = type_of(entry)
    if not any(branch.apart):
        return entry, kind
    at, (prefix, _) = patches_at(kind), branch.apart
    patches = patches_of(kind)
    return call(aten.slice.Tensor, entry, at, prefix, prefix + whole_size(patches[at])), patches


def _apart(graph: fx.Graph, call: Emit, part: Part, branch: Branch, type_of: TypeOf, last: bool) -> list[fx.Node]:
    """Return what a part makes of the tokens apart before the patches, or after (`last`): one node, or none.

    The branch is token-wise, so its nodes run on these few as they are.
    """
    count = branch.apart[last]
    if not count:
        return []
    copies: dict[fx.Node, fx.Node] = {}
    for entry in part.entries:
        at = patches_at(type_of(entry))
        whole = shape_of(entry)[at]
        copies[entry] = call(aten.slice.Tensor, entry, at, *((whole - count, whole) if last else (0, count)))
    for node in part.inside:
        copies[node] = _copy(graph, node, copies)
    return [copies[part.result]]


def _places(call: Emit, branch: Branch, like: fx.Node) -> fx.Node:
    """Return coordinates of an image's tokens by window, [windows, tokens, R]; padding has far-off, negative ones."""
    image = image_layout(branch.region)
    features = (Plain(len(image) - 1),)
    places = call(gtp_fx.grid_places.default, [whole_size(dim) for dim in image[1:]], like)
    padded = is_padded(branch)
    if padded:
        places = call(
            aten.add.Scalar, places, _FAR
        )  # so that padding, which is filled with 0, differs from every patch
    places = convert(call, places, (*image, features), by_window(branch.region, features))
    return call(aten.sub.Scalar, places, _FAR) if padded else places
