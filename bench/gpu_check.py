"""One comparison of a kernel with the operator it stands for: what it found, what it may find, and the memory that it
found it in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float32: 1e-5}
STOCK_TOLERANCE = 1e-4
"""Of scores from a log-sum-exp that torch's attention has made, with exponentials of its own."""

Random = Callable[..., Tensor]


@dataclass(frozen=True)
class Check:
    """error: the largest difference over the largest value; NaN where a kernel left poison. failed: why it gave
    nothing."""

    kernel: str
    case: str
    dtype: str
    error: float
    tolerance: float
    failed: str = ""

    @property
    def right(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


def randoms(device: torch.device, dtype: torch.dtype) -> Random:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, whole: bool = False) -> Tensor:
        """whole: in float32, as scores and scales are."""
        return torch.randn(*shape, generator=generator).to(device, torch.float32 if whole else dtype)

    return random


def check_of(kernel: str, case: str, dtype: torch.dtype, found: Tensor, wanted: Tensor) -> Check:
    tolerance = TOLERANCE[dtype]
    if found.device.type == "cpu" and dtype == torch.bfloat16:
        tolerance *= 2  # Triton's interpreter rounds to it towards 0
    return Check(kernel, case, name_of(dtype), error_of(found, wanted), tolerance)


def error_of(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """What `empty` makes holds NaN, or the largest integer, until somebody writes it."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
