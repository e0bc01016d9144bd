"""Launching of a Triton kernel: visible to a compiler, or as plain Python in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import torch
from triton.runtime.jit import JITFunction


def launcher(kernel: Any) -> Any:
    """Return `kernel` for use inside a triton_op: with TRITON_INTERPRET=1 a Python function, which runs on a CPU."""
    return torch.library.wrap_triton(kernel) if isinstance(kernel, JITFunction) else kernel
