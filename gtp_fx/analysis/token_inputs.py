"""Arguments that are streams of tokens: what an encoder without its embedding takes, or a graph after a graph break.

Nothing about such a graph shows a grid, so its tokens are a row (`Grid.placed` is False), and nothing shows which of
them are patches. What is known is how attention reads them, and that has to be the way of an image's tokens: each
attends to all, and what is added to the logits is learned. A mask tells of something else. It hides what comes later,
or what a shorter sentence lacks, so tokens aren't alike, and removing them isn't what the method is about.
"""

from __future__ import annotations

from torch import Tensor, fx, nn
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph.nodes import descendants
from gtp_fx.graph.operators import ATTENTION, CHOICES, COMPARISONS_WITH_NUMBER, PICKS_BY_INDEX
from gtp_fx.graph.symbols import is_symbolic
from gtp_fx.strategies.sites import Attention
from gtp_fx.types.axes import TokenAxis, TokenDomain
from gtp_fx.types.grids import Grid

GUARDED = 5
"""How many leading tokens are kept where nobody said how many prefix tokens there are.

A piece can't tell CLS from a patch. Most models have CLS and registers in front, at most five. A patch that is kept
for nothing costs its share of the saving; a CLS token that is removed would miss what every later block writes to it.
"""
_RANK = 3
_CHOOSES = (*CHOICES, *COMPARISONS_WITH_NUMBER, aten.masked_fill.Scalar, aten.masked_fill.Tensor)
"""Operators that hide entries of a mask."""


def argument_rank_fits(node: fx.Node) -> bool:
    """Return whether an argument is a floating-point [B, N, C], and no parameter that Dynamo lifted to an argument."""
    value = node.meta.get("val")
    if node.op != "placeholder" or not isinstance(value, Tensor) or _is_parameter(node):
        return False
    return value.ndim == _RANK and value.is_floating_point()


def tokens_of(node: fx.Node, prefix: int | None) -> TokenAxis | str:
    """Return the tokens of an argument [B, N, C], or the reason why it can have none.

    The reason is "" where there are too few; they may be a signal's channels, say.

    prefix: prefix tokens, where the user said how many; else the first `GUARDED` tokens are kept.
    """
    count = node.meta["val"].shape[1]
    kept = GUARDED if prefix is None else prefix
    if is_symbolic(count):
        return (
            f"{node.name} holds tokens whose number varies, as that of words does; "
            f"torch.compile(..., dynamic=False) gives each number a graph of its own"
        )
    if count <= kept + 1:
        return ""
    grid = Grid(node.name, (count - kept,), placed=False, guarded=prefix is None)
    return TokenAxis(TokenDomain(grid), prefix=kept)


def why_no_image(tokens: fx.Node, graph_module: fx.GraphModule) -> str:
    """Return why the attention that reads an argument isn't that of an image's tokens; "" where it is."""
    after = descendants(tokens)
    for node in graph_module.graph.nodes:
        if node.target not in ATTENTION or node not in after:
            continue
        if node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False):
            return f"{tokens.name} holds tokens that attend to earlier ones alone"
        bias = Attention.of(node).bias
        if bias is not None and not _is_learned(bias, tokens, graph_module):
            return (
                f"a mask that isn't learned is added to the attention over {tokens.name}, as sentences have it: "
                f"padding, or words that see earlier ones alone"
            )
    return ""


def _is_learned(bias: fx.Node, tokens: fx.Node, gm: fx.GraphModule) -> bool:
    """Return whether a bias is made of parameters and tokens alone, without choices; a table may say which are picked.

    Sizes that it takes from anywhere don't matter.
    """
    pending, seen = [bias], {bias}
    if not bias.meta["val"].is_floating_point():
        return False
    while pending:
        node = pending.pop()
        if node is tokens or _is_parameter(node, gm) or node.target is aten.zeros.default:
            continue
        # The first operand of these is what is picked from.
        operands = node.all_input_nodes[:1] if node.target in PICKS_BY_INDEX else node.all_input_nodes
        read = [other for other in operands if isinstance(other.meta.get("val"), Tensor)]
        if not read or node.target in _CHOOSES:
            return False
        pending += [other for other in read if other not in seen]
        seen.update(read)
    return True


def _is_parameter(node: fx.Node, gm: fx.GraphModule | None = None) -> bool:
    """Return whether an input is a parameter: an attribute of the graph, or one that Dynamo lifted to an argument."""
    if node.op == "get_attr" and gm is not None:
        owner, _, name = str(node.target).rpartition(".")
        return isinstance(getattr(gm.get_submodule(owner), name), nn.Parameter)
    return isinstance(node.meta.get("example_value"), nn.Parameter)
