"""FLOPs as torch itself counts them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from gtp_fx.capture.fused_layers import without_fused_layers

_FUSED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}
"""A formula for the CPU's fused attention, which some models choose themselves; torch's registry has none."""


def flops(run: Callable[..., Any], inputs: Sequence[Any]) -> int:
    """Count the FLOPs of one call, by attention's math; fused layers of nn.Transformer, which have no formula, open."""
    # Nothing that requires gradients: the counter hooks those, which fails within inference_mode.
    inputs = [value.detach() if isinstance(value, torch.Tensor) else value for value in inputs]
    counter = FlopCounterMode(display=False, custom_mapping=_FUSED)
    with torch.no_grad(), without_fused_layers(), sdpa_kernel(SDPBackend.MATH), counter:
        run(*inputs)
    return int(counter.get_total_flops())
