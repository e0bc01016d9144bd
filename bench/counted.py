"""FLOPs as torch itself counts them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def flops(run: Callable[..., Any], inputs: Sequence[Any]) -> int:
    """Count the FLOPs of one call, by attention's math: a CPU's fused operator has no formula in torch's registry."""
    # Without gradients: the counter hooks them, which fails on what inference_mode made.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run(*inputs)
    return int(counter.get_total_flops())
