"""Read the weights of an attention back to the logits that they are a softmax of, in any spelling.

    softmax(l), softmax(l, dtype=...), exp(log_softmax(l))
    exp(l - logsumexp(l))
    e / sum(e), where e is exp(l), or exp(l - m) for any m that a row has alone, such as its maximum

each over the last dimension, with casts and views between.
"""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph.operators import CASTS, CASTS_LIKE, REARRANGED, SOFTMAXES, SQUEEZES, VIEWS
from gtp_fx.graph.symbols import shape_of

NUMBER_PRESERVING = (*CASTS, *CASTS_LIKE, *REARRANGED)
"""What may stand between the parts of an attention: the same numbers, up to rounding."""
VIEWED = (*VIEWS, *SQUEEZES, aten.unsqueeze.default)
"""Views that keep the order of the entries, so each is a reshape."""


def read_softmax(weights: Any) -> fx.Node | None:
    """Return the logits that `weights` [..., queries, keys] are the softmax of over keys; None where they aren't.

    The logits may have other leading dimensions, with the entries in the same order. Nothing but the softmax reads
    them, and nothing but what reads `weights` reads a value between.
    """
    node = weights
    while isinstance(node, fx.Node) and node.target in (*NUMBER_PRESERVING, *VIEWED) and len(node.users) == 1:
        node = node.args[0]
    if not isinstance(node, fx.Node) or len(node.users) != 1:
        return None
    logits, inside = _over_last(node)
    if logits is None or not set(logits.users) <= inside:
        return None
    shapes = shape_of(weights), shape_of(node)
    return logits if shapes[0][-2:] == shapes[1][-2:] and shape_of(logits) == shapes[1] else None


_Found = tuple[fx.Node | None, set[fx.Node]]
"""The logits, and the nodes of the softmax that may read them."""
_NONE: _Found = (None, set())


def _over_last(node: fx.Node) -> _Found:
    """Return the logits of a softmax over the last dimension, and what of it reads them."""
    if node.target in SOFTMAXES:
        return (_tensor(node.args[0]), {node}) if _is_last(node.args[1], node) else _NONE
    if node.target is aten.exp.default:
        return _of_logarithm(_tensor(node.args[0]))
    if node.target is aten.div.Tensor:
        return _of_shares(_tensor(node.args[0]), _tensor(node.args[1]))
    return _NONE


def _of_logarithm(node: fx.Node | None) -> _Found:
    """Return the logits of a logarithm of a softmax: log_softmax(l), or l - logsumexp(l)."""
    if node is None or len(node.users) != 1:
        return _NONE
    if node.target is aten.log_softmax.int:
        return (_tensor(node.args[0]), {node}) if _is_last(node.args[1], node) else _NONE
    if node.target is aten.sub.Tensor and not node.kwargs:
        logits, total = _tensor(node.args[0]), _tensor(node.args[1])
        if total is not None and total.target is aten.logsumexp.default and _is_of_rows(total, logits):
            return logits, {node, total}
    return _NONE


def _of_shares(each: fx.Node | None, total: fx.Node | None) -> _Found:
    """Return the logits of exponentials over their sum."""
    if each is None or total is None or each.target is not aten.exp.default or not _is_of_rows(total, each):
        return _NONE
    if total.target is not aten.sum.dim_IntList or len(each.users) != 2:
        return _NONE
    shifted = _tensor(each.args[0])
    if shifted is None or len(shifted.users) != 1 or shifted.target is not aten.sub.Tensor or shifted.kwargs:
        return shifted, {each}
    # What a whole row is shifted by falls out of the quotient, whatever it is.
    logits, shift = _tensor(shifted.args[0]), _tensor(shifted.args[1])
    if logits is None or shift is None or shape_of(shift)[-1:] != (1,):
        return shifted, {each}
    made_of = {shifted}
    while shift is not None and set(shift.users) <= made_of:
        made_of.add(shift)
        shift = _tensor(shift.args[0]) if shift is not logits and shift.args else None
    return logits, made_of - {logits}


def _is_of_rows(node: fx.Node, of: fx.Node | None) -> bool:
    """Return whether a reduction of `of`, read once, is over the last dimension alone, which it keeps as one."""
    if of is None or node.args[:1] != (of,) or len(node.args) < 3 or len(node.users) != 1 or not node.args[2]:
        return False
    dims: Any = node.args[1]
    return len(dims) == 1 and _is_last(dims[0], of)


def _is_last(dim: Any, node: fx.Node) -> bool:
    return dim in (-1, len(shape_of(node)) - 1)


def _tensor(argument: Any) -> fx.Node | None:
    return argument if isinstance(argument, fx.Node) else None
