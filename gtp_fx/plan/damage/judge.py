"""Judging a rewritten graph by how far its outputs on unlabelled images are from the original's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gtp_fx.options.calibration import Call
from gtp_fx.plan.damage.divergence import divergence


@dataclass(frozen=True, eq=False)
class Judge:
    """Measures how far a graph's outputs are from the original's.

    calls: the images, as arguments of one call each.
    wanted: the original's outputs on them.
    """

    calls: tuple[Call, ...]
    wanted: tuple[Any, ...]

    @classmethod
    def of(cls, model: Callable[..., Any], calls: Sequence[Call]) -> Judge:
        """Make a judge by running the original once on every call."""
        with torch.no_grad():
            return cls(tuple(calls), tuple(model(*args, **kwargs) for args, kwargs in calls))

    def __call__(self, model: Callable[..., Any]) -> float:
        """Return the mean of `divergence` over images; 0 for the original itself."""
        total = images = 0.0
        with torch.no_grad():
            for (args, kwargs), wanted in zip(self.calls, self.wanted, strict=True):
                batch = _images(args, kwargs)
                total += batch * divergence(model(*args, **kwargs), wanted)
                images += batch
        return total / images


def _images(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the batch size of a call, which is that of its first tensor."""
    return next(t.shape[0] for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
