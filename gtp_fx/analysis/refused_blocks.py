"""Why tokens can't be removed at an attention block.

Its keys, its mask or its windows need the whole grid, or what follows the attention is no stream of tokens that could
be shortened.

What is decided about several blocks together is in `gtp_fx.analysis.blocks`; attention that is no block at all, in
`gtp_fx.analysis.unsupported_attention`.
"""

from __future__ import annotations

from torch import fx, nn

from gtp_fx.analysis.marks import MARK
from gtp_fx.analysis.queries_and_keys import pooled_to
from gtp_fx.analysis.residual_adds import residual_add
from gtp_fx.errors import Refusal
from gtp_fx.graph.nodes import (
    ancestors,
    attention_dropout,
    descendants,
    is_input,
    operator_name,
    refusal,
    source_line,
    tensors_of,
)
from gtp_fx.graph.operators import ATTENTION
from gtp_fx.graph.symbols import shape_of
from gtp_fx.strategies.sites import Attention
from gtp_fx.types.axes import is_plain, token_axis
from gtp_fx.types.infer import WholeTyping
from gtp_fx.types.places import is_window


def _joined_by(attention: fx.Node) -> str:
    """Return " (what came before it is joined to its result by aten.lerp.Scalar [model.py:3])", as far as known."""
    after, before = descendants(attention), ancestors(attention)
    for node in attention.graph.nodes:
        others = [x for x in node.all_input_nodes if x in before and not is_input(x) and tensors_of(x.meta.get("val"))]
        if node in after and others and tensors_of(node.meta.get("val")) and shape_of(node) == shape_of(others[0]):
            line = source_line(node)
            name = operator_name(node) + (f" [{line}]" if line else "")
            return f" (its result is joined with what came before it by {name})"
    return ""


def keeps_pictures_apart(attention: fx.Node) -> bool:
    """Return whether an attention over several grids in one sequence has a mask, neither learned nor computed."""
    grid = attention.meta[MARK].axis.domain.grid
    bias = Attention.of(attention).bias if attention.target in ATTENTION else None
    if bias is None or (grid.placed and not grid.apart):
        return False
    owner = attention.graph.owning_module

    def is_given(node: fx.Node) -> bool:
        if node.op == "get_attr" and owner is not None:
            path, _, name = str(node.target).rpartition(".")
            return isinstance(getattr(owner.get_submodule(path), name), nn.Parameter)
        return is_input(node)

    return not any(map(is_given, (bias, *ancestors(bias))))


def why_not(attention: fx.Node, site: fx.Node | None, typing: WholeTyping) -> Refusal | None:
    """Return why tokens can't be removed at a block, or None where they can."""

    def refuse(reason: str) -> Refusal:
        return refusal(attention, reason)

    query, key = attention.args[0], attention.args[1]
    if pooled_to(typing.type(query), typing.type(key)):  # type: ignore[arg-type]
        return refuse("keys are pooled over the grid, which has to stay whole for it")
    if keeps_pictures_apart(attention):
        return refuse(
            "several pictures stand in one sequence and a mask keeps them apart, so a token of one can't stand for "
            "another's: optimise the model for one picture a call"
        )
    if is_window(attention.meta[MARK].axis.domain.grid):
        return refuse("tokens attend within windows here, and the windows of the next block need the whole grid")
    # A site needs a residual add, live patches, and values laid out as the operators at a site take them.
    if site is None and (shared := residual_add(attention, typing)) is not None and MARK in shared.meta:
        return refuse(
            "it shares its residual add with a parallel attention, whose scores decide which tokens are removed there"
        )
    if site is None:
        return refuse(
            f"no residual add follows this attention{_joined_by(attention)}, so there is no stream to shorten"
        )
    stream = typing.type(site)
    if all(map(is_plain, stream)):
        return refuse("no output depends on patch tokens after this attention (dead tokens): there are none to remove")
    if len(stream) != 3 or token_axis(stream[1]) is None or not (is_plain(stream[0]) and is_plain(stream[2])):
        return refuse(
            f"tokens are removed from a residual stream [batch, tokens, channels], and this one has {len(stream)} "
            f"dimensions, such as [batch, height, width, channels]"
            if len(stream) != 3
            else "the three dimensions of its residual stream aren't batch, tokens and channels"
        )
    if len(typing.type(attention)) != 4:
        return refuse("queries are not laid out as [batch, heads, tokens, features]")
    if attention_dropout(attention):
        return refuse("attention dropout is active, which attention with scores does not have")
    if token_axis(typing.type(attention)[-2]) != token_axis(stream[1]):
        return refuse("the attention runs over other tokens than the residual stream")
    return None
