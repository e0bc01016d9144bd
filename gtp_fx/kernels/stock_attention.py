"""Choice of the kernel that torch's attention would take on a device.

A lowered graph calls that kernel by name, since it needs the log-sum-exp. `scaled_dot_product_attention` tries its
kernels in an order, and the first that supports the operands computes. The order is read from torch. What each kernel
supports follows `can_use_cudnn_attention` and `can_use_flash_attention` in ATen/native/transformers/cuda/sdp_utils.cpp,
of torch 2.11 and as of November 2026, for what is needed here: operands of four dimensions with equal numbers of heads,
without dropout and not causal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import attention

from gtp_fx.graph.torch_internals import attention_order

_NAMES = {
    attention.SDPBackend.CUDNN_ATTENTION: "cudnn",
    attention.SDPBackend.FLASH_ATTENTION: "flash",
    attention.SDPBackend.EFFICIENT_ATTENTION: "efficient",
    attention.SDPBackend.MATH: "math",
}


@dataclass(frozen=True)
class StockAttention:
    """Kernels that torch's attention chooses from.

    order: the enabled kernels in torch's order: "cudnn", "flash", "efficient", "math"; ("cpu",) without a GPU.
    capability: the GPU's compute capability.
    cudnn: the version of the cuDNN library, 91900 for 9.19.0, or 0 for none.
    deterministic: only deterministic algorithms may run.
    """

    order: tuple[str, ...]
    capability: tuple[int, int] = (0, 0)
    cudnn: int = 0
    deterministic: bool = False

    def choice(self, head: int, values: int, keys: int, dtype: torch.dtype, masked: bool) -> str | None:
        """Return the kernel that torch would take: "cudnn", "flash" or "cpu".

        None where it is one whose log-sum-exp isn't used here, or where torch would have to pad heads first.

        head: features of queries and keys, per head.
        values: features of values, per head.
        keys: number of keys.
        masked: whether there is an additive mask in the same dtype.
        """
        for kernel in self.order:
            if kernel not in _TAKES:
                return None
            if _TAKES[kernel](self, head, values, keys, dtype, masked):
                return kernel
        return None

    def _fits(self, head: int, values: int, dtype: torch.dtype) -> bool:
        """Return whether the requirements that flash attention and cuDNN's share are met."""
        halves = dtype in (torch.float16, torch.bfloat16)
        return halves and head % 8 == values % 8 == 0 and (8, 0) <= self.capability <= (12, 1)

    def _by_cudnn(self, head: int, values: int, keys: int, dtype: torch.dtype, masked: bool) -> bool:
        """Return whether cuDNN's attention supports the operands. Torch doesn't use versions below 9.

        The latest versions support heads above 128 on Hopper; no kernel of ours does, so neither does this.
        """
        supported = max(head, values) <= 128 and keys > 1 and self.cudnn >= 90_000 and not self.deterministic
        return supported and self._fits(head, values, dtype)

    def _by_flash(self, head: int, values: int, keys: int, dtype: torch.dtype, masked: bool) -> bool:
        """Return whether flash attention supports the operands."""
        return head == values <= 256 and not masked and self._fits(head, values, dtype)

    def _on_cpu(self, head: int, values: int, keys: int, dtype: torch.dtype, masked: bool) -> bool:
        """Return whether the CPU's attention does (ATen/native/transformers/sdp_utils_cpp.cpp)."""
        return head == values


_TAKES = {"cudnn": StockAttention._by_cudnn, "flash": StockAttention._by_flash, "cpu": StockAttention._on_cpu}


def stock_attention(device: torch.device) -> StockAttention:
    """Return what torch chooses from on `device`, as it is set up now.

    Settings come from `torch.nn.attention.sdpa_kernel`, the switches of `torch.backends.cuda` and the environment.
    """
    if device.type != "cuda":
        return StockAttention(("cpu",))
    return StockAttention(
        tuple(_NAMES[kernel] for kernel in attention_order(device) if kernel in _NAMES),
        torch.cuda.get_device_capability(device),
        torch.backends.cudnn.version() or 0,
        torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled(),
    )
