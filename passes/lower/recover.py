"""Tokens put back as one kernel, with the residual add that reads them."""

from __future__ import annotations

from torch import fx
from torch.ops import gtp_fx  # type: ignore[import-not-found]

from gtp_fx.graph.symbols import shape_of
from gtp_fx.passes.lower.lowering import Lowering, only, summands


def lower_recover(low: Lowering, node: fx.Node) -> None:
    """With the residual add, where that reads it at once."""
    x, shares, kept, left, *order = node.args
    if order[:2] != [0, 1] or len(shape_of(x)) != 3:  # type: ignore[arg-type]
        return
    places = None
    if shares.target is gtp_fx.region_shares.default:  # type: ignore[union-attr]
        places, shares = shares.args[0], None  # type: ignore[union-attr]
    add = only(iter(node.users))
    residual = None if add is None else _residual(add, node)
    after = node if residual is None else add
    assert after is not None
    made = low.call(after, low.kernels.recover, x, shares, places, residual, kept, left, *order[2:])
    low.swap(after, made)


def _residual(add: fx.Node, to: fx.Node) -> fx.Node | None:
    """What `add` adds to `to`, of the same shape and dtype."""
    found = summands(add)
    return None if found is None else only(value for value in found if value is not to)  # type: ignore[no-any-return]
