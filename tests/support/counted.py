"""FLOPs as torch itself counts them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def flops(run: Callable[..., Any], inputs: Sequence[Any]) -> int:
    """FLOPs of one call. By attention's math, since a CPU's fused operator has no formula in torch's registry."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run(*inputs)
    return int(counter.get_total_flops())
