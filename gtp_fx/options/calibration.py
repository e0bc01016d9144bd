"""Unlabelled images that schedule="auto" may learn from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from gtp_fx.errors import OptionError

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""One batch, as the arguments of a model's call."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """What schedule="auto" may learn from.

    images: batches of the model's inputs, each a tensor, a tuple of arguments or a dict of keyword arguments; some dozens of images
        are enough, labels are never asked for.
    points: token counts measured at each block. refine: evaluations of whole schedules that may follow, 0 for none.
    strategy: let those also choose alpha, M and theta of GTP. cache: keep what was measured in the user's cache, by weights and
        images. progress: show a bar.
    """

    images: Any
    points: int = 6
    refine: int = 0
    strategy: bool = False
    cache: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        for option, least in (("points", 1), ("refine", 0)):
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise OptionError(f"Calibration({option}={value!r}): give an integer of at least {least}")
        if self.strategy and not self.refine:
            raise OptionError("Calibration(strategy=True) chooses by evaluating: give refine=30, say, too")

    @classmethod
    def of(cls, value: Any) -> Calibration:
        """A Calibration from what a user gave: itself, a tensor of images, or batches."""
        return value if isinstance(value, Calibration) else cls(value)

    def batches(self) -> list[Any]:
        """Raises OptionError where there is no image."""
        images = self.images
        found = (
            [images]
            if isinstance(images, Tensor | Mapping)
            else list(images)
            if isinstance(images, Sequence) and not isinstance(images, str)
            else None
        )
        if not found:
            raise OptionError(
                f"calibration={type(images).__name__ if not isinstance(images, str) else repr(images)}: give a tensor of images, or a list of batches, each a tensor, a tuple of "
                f"arguments or a dict of keyword arguments"
            )
        return found


def bound(calibration: Calibration, canonical: Callable[..., Call]) -> Calibration:
    """With its batches as calls in the model's captured form. Raises what `canonical` does for another form."""
    calls = []
    for batch in calibration.batches():
        if isinstance(batch, Mapping):
            calls.append(canonical((), dict(batch)))
        else:
            calls.append(canonical(tuple(batch) if isinstance(batch, list | tuple) else (batch,), {}))
    return replace(calibration, images=tuple(calls))
