"""Exact: a convolution over a row of tokens with a kernel of one becomes the linear layer that it is.

    conv1d(x [B, C, N], weight [C', C, 1])   ->   linear(x [B, N, C], weight [C', C]) [B, N, C'], turned to [B, C', N]

Where the tokens were turned before it, or are turned back after it, the two turns cancel. A convolution that makes the
tokens (of a series, whose patches are single samples) stays.
"""

from __future__ import annotations

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.capture.layers import stays_whole
from gtp_fx.graph import edit, nodes
from gtp_fx.graph.operators import PERMUTATIONS
from gtp_fx.graph.rearrangements import order_of
from gtp_fx.graph.symbols import shape_of
from gtp_fx.types.axes import is_plain
from gtp_fx.types.infer import WholeTyping
from gtp_fx.types.rules.spatial import is_pointwise

_CONVOLUTIONS = (aten.conv1d.default, aten.conv1d.padding)
_TURN = [0, 2, 1]


def pointwise_convolutions(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of `gm` in which such convolutions are linear layers; `gm` itself where there are none."""
    if not nodes.count_nodes(gm.graph, _CONVOLUTIONS):
        return gm
    typing = typed_graph(gm.graph).whole
    convolutions = [node for node in gm.graph.nodes if node.target in _CONVOLUTIONS and not stays_whole(gm, node)]
    found = [node for node in convolutions if _reads_tokens(node, typing)]
    if not found:
        return gm
    gm, copies = edit.copy_with_nodes(gm)
    for node in found:
        _as_linear(gm.graph, copies[node])
    return edit.finish(gm)


def _reads_tokens(node: fx.Node, typing: WholeTyping) -> bool:
    """Tell whether a convolution works token by token on [B, C, N]."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    return is_pointwise(node) and len(shape_of(x)) == 3 and not is_plain(typing.type(x)[2])


def _as_linear(graph: fx.Graph, node: fx.Node) -> None:
    """Replace the convolution, and turns around it that cancel."""
    emit = edit.Emitter(graph, like=node, before=node)
    x, weight, *rest = node.args
    assert isinstance(x, fx.Node)
    x_BNC = x.args[0] if _turns(x) else emit(aten.permute.default, x, _TURN)
    linear = emit(aten.linear.default, x_BNC, emit(aten.squeeze.dim, weight, 2), rest[0] if rest else None)
    for user in [user for user in node.users if _turns(user)]:
        user.replace_all_uses_with(linear)
    edit.replace(node, emit(aten.permute.default, linear, _TURN))


def _turns(node: fx.Node) -> bool:
    """Tell whether a node swaps the last two of three dimensions."""
    return node.target in PERMUTATIONS and order_of(node) == tuple(_TURN)
