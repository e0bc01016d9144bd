"""Steps of values that are tokens, or places of padded windows, in whatever arrangement.

Tokens become [windows, patches, features], so that what only rearranges them is gone. Where windows are padded, they
become [images, tokens of the windows that are awake, features], and what is padded [windows, patches and padding,
features].
"""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.analysis.branch_parts import is_token_wise, with_fewer_dimensions
from gtp_fx.analysis.window_forms import PADDED, Forms, NoRest, Run
from gtp_fx.analysis.window_steps import CROP, MOVES, PAD, Step
from gtp_fx.graph.nodes import operator_name, pads_with_zeros
from gtp_fx.graph.operators import PADDINGS, VIEWS
from gtp_fx.graph.symbols import shape_of
from gtp_fx.types.axes import TensorType, is_plain, whole_size


def step_of_tokens(node: fx.Node, forms: Forms) -> Step:
    """Return what a node does whose result is tokens, and note its form. Raises NoRest."""
    own = forms.own(node)
    forms.of[node] = None
    if _moves(node, own, forms):
        form = forms.of[own[0]]
        if form is None:
            return _moved(node, own[0], forms)
        if form == PADDED and forms.typing.type(own[0])[-1] == forms.typing.type(node)[-1]:
            return Step(node, CROP, (own[0],))
        return _out_of_windows(node, own[0], forms)
    return _token_wise(node, own, forms)


def step_of_padded(node: fx.Node, forms: Forms) -> Step:
    """Return what a node does whose result is padded, and note its form. Raises NoRest."""
    own = forms.own(node)
    forms.of[node] = PADDED
    if node.target in PADDINGS:
        if forms.of[own[0]] is not None or not pads_with_zeros(node):
            raise NoRest("its windows are padded with something else than zeros, or more than once")
        return Step(node, PAD, (own[0],))
    if _moves(node, own, forms):
        if forms.of[own[0]] == PADDED:
            return _moved(node, own[0], forms)
        return _out_of_windows(node, own[0], forms)
    return _token_wise(node, own, forms)


def _moves(node: fx.Node, own: list[fx.Node], forms: Forms) -> bool:
    """Return whether a node only rearranges the tokens of its one operand, or takes some of their features."""
    return node.target in MOVES and own == [node.args[0]] and not _shifts_features(node, forms.typing.type(own[0]))


def _shifts_features(node: fx.Node, kind: TensorType) -> bool:
    """Return whether features, the last dimension, are rolled or padded, alone or with tokens. kind: the operand's."""
    named: Any = node.args[2] if node.target is aten.roll.default else ()
    amounts: Any = node.args[1] if node.target in PADDINGS else ()
    return any(is_plain(kind[dim]) for dim in named) or any(amounts[:2])


def _moved(node: fx.Node, operand: fx.Node, forms: Forms) -> Step:
    """Return the step of what only rearranges tokens, or takes some of their features."""
    kind, before = forms.typing.type(node), forms.typing.type(operand)
    if before[-1] == kind[-1]:
        return Step(node, None, (operand,))
    if node.target is not aten.slice.Tensor or before[:-1] != kind[:-1]:
        raise NoRest("features are taken apart between tokens")
    return Step(node, node.target, with_fewer_dimensions(node), node.kwargs)  # some of the features


def _out_of_windows(node: fx.Node, operand: fx.Node, forms: Forms) -> Step:
    kind, form = forms.typing.type(node), forms.of[operand]
    if node.target not in VIEWS or not isinstance(form, Run) or form.at or not forms.in_rows(kind):
        raise NoRest("what leads out of its windows isn't a view")
    shape = (-1, whole_size(forms.rows[1]), whole_size(kind[-1]))
    return Step(node, aten.reshape.default, (operand, list(shape)))


def _token_wise(node: fx.Node, own: list[fx.Node], forms: Forms) -> Step:
    typing, kind = forms.typing, forms.typing.type(node)
    alike = all(forms.of[n] == forms.of[node] and typing.type(n)[:-1] == kind[:-1] for n in own)
    if not alike or not is_token_wise(node, kind[:-1], typing):
        raise NoRest(f"{operator_name(node)} inside it isn't token-wise")
    # A parameter of more dimensions, [1, 1, 1, C], would give them to the tokens.
    tables = [n for n in node.all_input_nodes if n not in own and typing.is_tensor(n) and len(shape_of(n)) > 1]
    flat = () if node.target is aten.linear.default else tuple((n, (shape_of(n)[-1],)) for n in tables)
    return Step(node, node.target, with_fewer_dimensions(node), node.kwargs, (), flat)
