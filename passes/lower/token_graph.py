"""Lowering of the token graph to one kernel, where it needs similar tokens."""

from __future__ import annotations

import torch
from torch import fx

from gtp_fx.passes.lower.lowering import Lowering, fits_kernels

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def lower_token_graph(low: Lowering, node: fx.Node) -> None:
    """Lower `token_graph`, except for spatial graphs: these compare only coordinates, and the operator does as well."""
    x, grid, _, kind, neighbors, *places = node.args  # type: ignore[misc]
    if places:
        return  # in another order than the grid's, which the kernel's coordinates are of
    if kind == "spatial" or not fits_kernels(grid) or not 1 <= neighbors <= low.kernels.most_neighbors:  # type: ignore[arg-type,operator]
        return
    if x.meta["val"].dtype not in _DTYPES:  # type: ignore[union-attr]
        return
    made = low.call(node, low.kernels.token_graph, *node.args)
    for part in list(node.users):
        low.swap(part, low.item(made, part.args[1]))  # type: ignore[arg-type]
