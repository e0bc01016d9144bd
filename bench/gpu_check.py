"""Comparison of one kernel with the operator it replaces: errors, tolerances and poisoned memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float32: 1e-5}
STOCK_TOLERANCE = 1e-4
"""Tolerance of scores from a log-sum-exp of torch's attention, which computes exponentials in its own way."""

Random = Callable[..., Tensor]


@dataclass(frozen=True)
class Check:
    """Result of one check.

    kernel: what was checked.
    case: sizes and options.
    dtype: dtype of the operands.
    error: largest difference / largest value; NaN where a kernel left poisoned memory unwritten.
    tolerance: largest permitted error.
    failed: error message where the kernel raised, else "".
    """

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
    """Return a function from a shape to random numbers, the same in each run."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, whole: bool = False) -> Tensor:
        """Return random numbers; in float32 where `whole`, as scores and scales are, else in `dtype`."""
        return torch.randn(*shape, generator=generator).to(device, torch.float32 if whole else dtype)

    return random


def check_of(kernel: str, case: str, dtype: torch.dtype, found: Tensor, wanted: Tensor) -> Check:
    """Compare `found` with `wanted`, with the tolerance of `dtype`."""
    tolerance = TOLERANCE[dtype]
    if found.device.type == "cpu" and dtype == torch.bfloat16:
        tolerance *= 2  # Triton's interpreter rounds to bfloat16 towards 0
    return Check(kernel, case, name_of(dtype), error_of(found, wanted), tolerance)


def error_of(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference / the largest value."""
    return float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill memory from `torch.empty` with NaN, or the largest integer, within the context."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
