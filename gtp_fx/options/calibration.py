"""Calibration: unlabelled images on which schedule="auto" and strategy="auto" measure what removing tokens changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gtp_fx.errors import OptionError

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one model call, which is one batch."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Calibration images and how to use them, for schedule="auto", and for strategy="auto" with it.

    images: batches of the model's inputs, each a tensor, a tuple of arguments or a dict of keyword arguments. Some
        dozens of images are enough; no labels are needed.
    points: token counts measured at each block.
    refine: most evaluations of whole schedules afterwards; 0 for none. strategy="auto" takes at least a few
        (`gtp_fx.plan.contest`).
    cache: whether to keep judgments in the user's cache, keyed by weights and images.
    progress: whether to show a progress bar, where stderr is a terminal.

    Raises OptionError for a value out of range.
    """

    images: Any = field(repr=False)
    points: int = 6
    refine: int = 0
    cache: bool = True
    progress: bool = False

    def __post_init__(self) -> None:
        from gtp_fx.strategies.plain_numbers import plain  # which imports torch: this module's names cost nothing

        for option, least in (("points", 1), ("refine", 0)):
            value = plain(getattr(self, option))
            object.__setattr__(self, option, value)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise OptionError(f"Calibration({option}={value!r}): give an integer of at least {least}")

    @classmethod
    def of(cls, value: Any) -> Calibration:
        """Return a Calibration from what a user gave: a Calibration, a tensor of images, or batches."""
        return value if isinstance(value, Calibration) else cls(value)

    def batches(self) -> list[Any]:
        """Return the images as a list of batches. Raises OptionError where there is none."""
        from torch import Tensor

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
                f"calibration={repr(images) if isinstance(images, str) else type(images).__name__}: give a tensor of "
                f"images, or a list of batches, each a tensor, a tuple of arguments or a dict of keyword arguments; of "
                f"a DataLoader with labels, [images for images, labels in loader]"
            )
        return found


def calls_of(calibration: Calibration) -> Iterator[Call]:
    """Yield the batches as calls."""
    for batch in calibration.batches():
        if isinstance(batch, Mapping):
            yield (), dict(batch)
        else:
            yield tuple(batch) if isinstance(batch, list | tuple) else (batch,), {}


def bound(calibration: Calibration, canonical: Callable[..., Call]) -> Calibration:
    """Return `calibration` with its batches as calls in the model's captured form.

    canonical: `CallSignature.canonical` of the captured model; its errors propagate to the caller.
    """
    return replace(calibration, images=tuple(canonical(*call) for call in calls_of(calibration)))


def bound_where(
    calibration: Calibration, takes: Callable[..., bool], canonical: Callable[..., Call]
) -> Calibration | None:
    """Return `calibration` with the batches of one form alone, as calls in that form; None where there is none.

    takes, canonical: of the `CallSignature`.
    """
    images = tuple(canonical(*call) for call in calls_of(calibration) if takes(*call))
    return replace(calibration, images=images) if images else None
