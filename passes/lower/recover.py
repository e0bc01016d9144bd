"""Lowering of `recover` to one kernel, with the residual add that reads its result."""

from __future__ import annotations

from torch import fx
from torch.ops import gtp_fx  # type: ignore[import-not-found]

from gtp_fx.graph.symbols import shape_of
from gtp_fx.passes.lower.lowering import Lowering, only, summands


def lower_recover(low: Lowering, node: fx.Node) -> None:
    """Lower a `recover` along dimension 1 of [B, N, C], with the residual add where that alone reads it."""
    x, shares, kept, removed, *order = node.args
    if order[:2] != [0, 1] or len(shape_of(x)) != 3:  # type: ignore[arg-type]
        return
    # The kernel can compute shares of windows from the tokens' places.
    places = None
    if shares.target is gtp_fx.region_shares.default:  # type: ignore[union-attr]
        places, shares = shares.args[0], None  # type: ignore[union-attr]
    add = only(iter(node.users))
    residual = None if add is None else _residual(add, node)
    after = node if residual is None else add
    assert after is not None
    made = low.call(after, low.kernels.recover, x, shares, places, residual, kept, removed, *order[2:])
    low.swap(after, made)


def _residual(add: fx.Node, to: fx.Node) -> fx.Node | None:
    """Return what `add` adds to `to`; None where shapes or dtypes differ."""
    found = summands(add)
    return None if found is None else only(value for value in found if value is not to)  # type: ignore[no-any-return]
