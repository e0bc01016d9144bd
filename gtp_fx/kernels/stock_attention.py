"""Which of its kernels torch's attention would choose on a device: the one that a lowered graph calls by name for its log-sum-exp.

`scaled_dot_product_attention` asks its kernels in an order, and the first that takes the operands computes. The order is torch's own to tell.
What a kernel takes is ATen/native/transformers/cuda/sdp_utils.cpp's: `can_use_cudnn_attention` and `can_use_flash_attention`, of torch
2.11 and as of November 2026, for what is asked here: four dimensions, as many heads of each, neither dropout nor causal.
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
    """What torch chooses from.

    order: the kernels that are enabled, in torch's order: "cudnn", "flash", "efficient", "math"; ("cpu",) where there is no GPU.
    capability: the GPU's. cudnn: its library's version, 91900 for 9.19.0, or 0 for none. deterministic: nothing else may run.
    """

    order: tuple[str, ...]
    capability: tuple[int, int] = (0, 0)
    cudnn: int = 0
    deterministic: bool = False

    def choice(self, head: int, values: int, keys: int, dtype: torch.dtype, masked: bool) -> str | None:
        """The kernel that torch would take: "cudnn", "flash" or "cpu"; None where it is one whose log-sum-exp isn't asked for, or
        where torch would have to pad heads first.

        head: features of queries and keys. values: of values. masked: whether there is an additive mask in the same dtype.
        """
        for kernel in self.order:
            if kernel not in _TAKES:
                return None
            if _TAKES[kernel](self, head, values, keys, dtype, masked):
                return kernel
        return None

    def _fits(self, head: int, values: int, dtype: torch.dtype) -> bool:
        """What flash attention and cuDNN's have in common."""
        halves = dtype in (torch.float16, torch.bfloat16)
        return halves and head % 8 == values % 8 == 0 and (8, 0) <= self.capability <= (12, 1)

    def _by_cudnn(self, head: int, values: int, keys: int, dtype: torch.dtype, masked: bool) -> bool:
        """Its latest versions take heads above 128 on Hopper; no kernel of ours does. Torch leaves out versions below 9."""
        of_it = max(head, values) <= 128 and keys > 1 and self.cudnn >= 90_000 and not self.deterministic
        return of_it and self._fits(head, values, dtype)

    def _by_flash(self, head: int, values: int, keys: int, dtype: torch.dtype, masked: bool) -> bool:
        return head == values <= 256 and not masked and self._fits(head, values, dtype)

    def _on_cpu(self, head: int, values: int, keys: int, dtype: torch.dtype, masked: bool) -> bool:
        """ATen/native/transformers/sdp_utils_cpp.cpp."""
        return head == values


_TAKES = {"cudnn": StockAttention._by_cudnn, "flash": StockAttention._by_flash, "cpu": StockAttention._on_cpu}


def stock_attention(device: torch.device) -> StockAttention:
    """As torch is set up now, by `torch.nn.attention.sdpa_kernel`, the switches of `torch.backends.cuda` and the environment."""
    if device.type != "cuda":
        return StockAttention(("cpu",))
    return StockAttention(
        tuple(_NAMES[kernel] for kernel in attention_order(device) if kernel in _NAMES),
        torch.cuda.get_device_capability(device),
        torch.backends.cudnn.version() or 0,
        torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled(),
    )
