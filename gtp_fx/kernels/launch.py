"""How a Triton kernel is launched: so that a compiler sees it, or as plain Python in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import torch
from triton.runtime.jit import JITFunction


def launcher(kernel: Any) -> Any:
    """`kernel` for use inside a triton_op. With TRITON_INTERPRET=1 it is a Python function, which runs on a CPU."""
    return torch.library.wrap_triton(kernel) if isinstance(kernel, JITFunction) else kernel
