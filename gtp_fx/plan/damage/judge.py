"""Unlabelled images, and how a model's outputs on them move when tokens leave."""

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
    """Says how far a graph's outputs are from the original's. calls: the images; wanted: the original's outputs on them."""

    calls: tuple[Call, ...]
    wanted: tuple[Any, ...]

    @classmethod
    def of(cls, model: Callable[..., Any], calls: Sequence[Call]) -> Judge:
        with torch.no_grad():
            return cls(tuple(calls), tuple(model(*args, **kwargs) for args, kwargs in calls))

    def __call__(self, model: Callable[..., Any]) -> float:
        """Mean over images of `divergence`; 0 for the original itself."""
        total = images = 0.0
        with torch.no_grad():
            for (args, kwargs), wanted in zip(self.calls, self.wanted, strict=True):
                batch = _images(args, kwargs)
                total += batch * divergence(model(*args, **kwargs), wanted)
                images += batch
        return total / images


def _images(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return next(t.shape[0] for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
