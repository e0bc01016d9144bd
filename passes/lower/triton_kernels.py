"""Exact: GTP's operators become the Triton kernels of `gtp_fx.kernels`, for graphs that run on a GPU.

This runs last, on graphs about to be compiled; users see, export and run elsewhere the plain ATen before it. Operators
that belong together become one kernel:

    token_graph                                     token_graph, where it needs similar tokens (indices in int32)
    key_bias and attention                          stock attention or attend (`attention_forms`)
    attention_with_scores                           the same, and attention_scores
    select and where its tokens are on the grid     select
    an add (LayerScale too), propagate and a norm   propagate, of tokens and of scales
    region_shares, recover and a residual add       recover

Calls that no kernel takes (another rank, theta < 1, heads of 256, merging) are kept; composite operators run anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx
from torch.ops import aten, gtp_fx  # type: ignore[import-not-found]

from gtp_fx.graph import edit
from gtp_fx.graph.verify import propagate_shapes
from gtp_fx.kernels.available import has_kernels, load_kernels
from gtp_fx.kernels.stock_attention import StockAttention, stock_attention
from gtp_fx.passes.lower.attention import lower_attention, lower_scored_attention
from gtp_fx.passes.lower.lowering import Lowering
from gtp_fx.passes.lower.recover import lower_recover
from gtp_fx.passes.lower.sites import lower_propagate, lower_select
from gtp_fx.passes.lower.token_graph import lower_token_graph


def lowered(
    gm: fx.GraphModule, device: torch.device, disabled: Sequence[str] = (), scale_form: str = "auto"
) -> fx.GraphModule:
    """Return `gm` with Triton kernels where `device` is a GPU that has them; else, or where the pass is disabled, `gm`.

    Export and eager runs take `gm`, which is plain ATen.

    disabled: names of passes that don't run.
    scale_form: how attention gets token scales, `Target.scale_form`.
    """
    if not has_kernels(device) or "triton_kernels" in disabled:
        return gm
    return triton_kernels(gm, stock_attention(device), scale_form)


def triton_kernels(gm: fx.GraphModule, stock: StockAttention | None = None, scale_form: str = "auto") -> fx.GraphModule:
    """Return a copy of `gm` that calls Triton kernels. Raises ImportError where Triton isn't installed.

    stock: torch's choice of attention kernels on the graph's device; None uses `attend` wherever it can.
    scale_form: how attention gets token scales, `Target.scale_form`.
    """
    gm = edit.copy_of(gm)
    lowering = Lowering(gm.graph, load_kernels(), stock, scale_form)
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target in _LOWERINGS:
            _LOWERINGS[node.target](lowering, node)
    for node in lowering.instead:  # they had the shapes of what they replace; recompute
        node.meta.pop("val", None)
    gm = edit.finish(gm)
    propagate_shapes(gm, after="triton_kernels")
    return gm


_LOWERINGS = {
    gtp_fx.token_graph.default: lower_token_graph,
    aten.scaled_dot_product_attention.default: lower_attention,
    gtp_fx.attention_with_scores.default: lower_scored_attention,
    gtp_fx.select.default: lower_select,
    gtp_fx.propagate.default: lower_propagate,
    gtp_fx.recover.default: lower_recover,
}
