"""torch's own attention with a given kernel, and with the log-sum-exp that it saves for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.ops import gtp_fx  # type: ignore[import-not-found]

from bench.gpu_contenders import ATTENTION


def stock_attention(
    kind: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Return torch's attention with the kernels of `kind`, a name in `ATTENTION`."""
    with sdpa_kernel(list(ATTENTION[kind]), set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def log_sum_exps(q: Tensor, k: Tensor, v: Tensor) -> Mapping[str, Callable[[], tuple[Tensor, Tensor]]]:
    """Return a function for each kernel that returns the output and each row's log-sum-exp [B, H, N]."""
    kinds = ("cudnn", "flash") if q.device.type == "cuda" else ("cpu",)
    return {kind: partial(gtp_fx.attention_with_lse, q, k, v, None, None, kind) for kind in kinds}


def kernel_taken(kind: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> str:
    """Return the kernel that `stock_attention` actually runs, since torch skips one that can't take these operands."""
    with sdpa_kernel(list(ATTENTION[kind]), set_priority=True):
        return kernel_chosen(q, k, v, mask)


def kernel_chosen(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> str:
    """Return the kernel that torch selects for these operands with the current settings."""
    chosen: Any = torch._fused_sdp_choice(q, k, v, attn_mask=mask)
    names = {int(backend.value): name for name, backend in torch.nn.attention.SDPBackend.__members__.items()}
    return names.get(int(chosen), str(chosen)).removesuffix("_ATTENTION").lower()
