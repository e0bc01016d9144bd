"""Handwritten digits on cluttered canvases, a task that small nets learn in minutes.

The digits come with scikit-learn. A canvas shows one whole digit (8 x 8 pixels in the data set, drawn at more than
twice that size) at a random place, among cut-out pieces of other digits, strokes and noise. Its label is the whole
digit's. Most patches are background, as in photographs, and it takes several patches to tell a whole digit from a piece
of one. Splits share no digit image.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

Pixels = NDArray[np.float32]

CLASSES = 10
_SHARES = (0.70, 0.10, 0.20)
"""Shares of the digit images in the splits train, calibration and test."""
_NEAREST_PIECE = 4
"""Least distance of a piece of clutter's centre from the digit's box, in pixels, so that the digit stays readable."""
_INK, _COVERED = 0.3, 0.1
"""Least brightness of an inked pixel, and least inked share of a patch that is labelled with the digit."""
_TRIES = 1000
"""Most attempts to place a piece of clutter. A canvas hardly larger than its digit has no room for it."""


class Split(enum.IntEnum):
    """Split of the digit images. A canvas takes its digit and its clutter from one split."""

    train = 0
    calibration = 1
    test = 2


@dataclass(frozen=True)
class Look:
    """Appearance of a canvas.

    side: side of the canvas, in pixels.
    smallest: smallest side of the digit, in pixels.
    largest: largest side of the digit.
    pieces: number of pieces of other digits.
    strokes: number of strokes.
    noise: standard deviation of the noise added to every pixel; pixels are from 0 to 1.
    raster: the digit's corner is near a multiple of this many pixels; arbitrary places take far longer to learn.
    jitter: most pixels by which the corner is right of and below such a multiple.

    Raises ValueError where the digit may not fit on the canvas.
    """

    side: int = 64
    smallest: int = 18
    largest: int = 20
    pieces: int = 6
    strokes: int = 3
    noise: float = 0.1
    raster: int = 8
    jitter: int = 2

    def __post_init__(self) -> None:
        if self.side < self.largest + self.jitter:
            raise ValueError(
                f"a canvas of {self.side} pixels is too small for digits of {self.largest} + {self.jitter}"
            )


def canvases(split: Split, seed: int, n: int, look: Look | None = None) -> tuple[Tensor, Tensor]:
    """Return `n` canvases [n, 1, side, side], centred and scaled, and their labels [n], determined by the arguments."""
    look = look or Look()
    drawn = _drawn(split, seed, n, look)
    return as_images([canvas for canvas, _, _ in drawn]), torch.tensor([label for _, _, label in drawn])


def patch_labels(split: Split, seed: int, n: int, look: Look, patch: int) -> tuple[Tensor, Tensor]:
    """Return the canvases of `canvases`, and a label per patch [n, patches].

    The label is d + 1 where ink of the whole digit d covers at least `_COVERED` of the patch, and 0 elsewhere. Pieces,
    strokes and noise don't count.
    """
    drawn = _drawn(split, seed, n, look)
    ink = torch.from_numpy(np.stack([ink for _, ink, _ in drawn]))[:, None]
    digit = torch.tensor([label for _, _, label in drawn])[:, None] + 1
    covered = F.avg_pool2d((ink > _INK).float(), patch).flatten(1) >= _COVERED
    return as_images([canvas for canvas, _, _ in drawn]), torch.where(covered, digit, 0)


def as_images(drawn: Sequence[Pixels]) -> Tensor:
    """Return canvases as a tensor [n, 1, side, side], centred and scaled."""
    return (torch.from_numpy(np.stack(drawn))[:, None] - 0.1) / 0.3


def _drawn(split: Split, seed: int, n: int, look: Look) -> list[tuple[Pixels, Pixels, int]]:
    """Return each canvas, the whole digit on an empty canvas, and its label."""
    chance = np.random.default_rng((int(split), seed))
    pool = digit_indices(split)
    shown = chance.choice(pool, n)
    return [(*_canvas(int(index), pool, look, chance), int(digits()[1][index])) for index in shown]


@functools.cache
def digit_indices(split: Split) -> NDArray[np.int64]:
    """Return the indices in scikit-learn's set of a split's digit images."""
    count = len(digits()[1])
    bounds = np.cumsum(np.array([0, *_SHARES]) * count).round().astype(int)
    order = np.random.default_rng(0).permutation(count)
    return order[bounds[split] : bounds[split + 1]]


@functools.cache
def digits() -> tuple[Pixels, NDArray[np.int64]]:
    """Return the digit images [1797, 8, 8], from 0 to 1, and their labels [1797]."""
    found = load_digits()
    return (found.images / 16).astype(np.float32), found.target.astype(np.int64)


@functools.cache
def enlarged(side: int) -> Pixels:
    """Return every digit image, resized to [1797, side, side]."""
    images = torch.from_numpy(digits()[0])[:, None]
    return np.asarray(F.interpolate(images, size=(side, side), mode="bilinear")[:, 0])


def _canvas(index: int, pool: NDArray[np.int64], look: Look, chance: np.random.Generator) -> tuple[Pixels, Pixels]:
    """Return a canvas with digit `index`, and the digit on an empty canvas."""
    canvas = np.zeros((look.side, look.side), np.float32)
    side = int(chance.integers(look.smallest, look.largest + 1))
    top, left = _corner(side, look, chance), _corner(side, look, chance)
    for other in chance.choice(pool, look.pieces):
        put(canvas, _piece(enlarged(side)[other], chance), _away_from(top, left, side, look.side, chance))
    for _ in range(look.strokes):
        put(canvas, stroke(side // 2, chance), _away_from(top, left, side, look.side, chance))
    ink = np.zeros_like(canvas)
    put(ink, enlarged(side)[index], (top, left))
    put(canvas, ink, (0, 0))
    return canvas + look.noise * chance.standard_normal(canvas.shape, np.float32), ink


def _corner(side: int, look: Look, chance: np.random.Generator) -> int:
    """Draw the row or column where a digit begins."""
    places = (look.side - side - look.jitter) // look.raster + 1
    return int(chance.integers(0, places)) * look.raster + int(chance.integers(0, look.jitter + 1))


def _piece(digit: Pixels, chance: np.random.Generator) -> Pixels:
    """Cut a random piece of about a quarter from a digit."""
    side = len(digit)
    height, width = (int(size) for size in chance.integers(side // 3, side * 2 // 3 + 1, 2))
    top, left = int(chance.integers(0, side - height + 1)), int(chance.integers(0, side - width + 1))
    return digit[top : top + height, left : left + width]


def stroke(length: int, chance: np.random.Generator) -> Pixels:
    """Draw a straight line, two pixels wide, in a box [length, length]."""
    slope = float(chance.uniform(-1, 1))
    box = np.zeros((length, length), np.float32)
    along = np.arange(length)
    across = np.clip((length / 2 + slope * (along - length / 2)).astype(int), 0, length - 2)
    box[along, across] = box[along, across + 1] = float(chance.uniform(0.6, 1))
    return box.T if chance.random() < 0.5 else box


def _away_from(top: int, left: int, side: int, canvas: int, chance: np.random.Generator) -> tuple[int, int]:
    """Draw the corner of a piece of clutter at a distance from the digit; off the canvas if there is no room."""
    for _ in range(_TRIES):
        y, x = (int(at) for at in chance.integers(0, canvas, 2))
        near_y = top - _NEAREST_PIECE <= y < top + side + _NEAREST_PIECE
        near_x = left - _NEAREST_PIECE <= x < left + side + _NEAREST_PIECE
        if not (near_y and near_x):
            return y - side // 4, x - side // 4
    return canvas, canvas


def put(canvas: Pixels, patch: Pixels, corner: tuple[int, int]) -> None:
    """Draw `patch` onto `canvas` at `corner`, in place. The brighter pixel wins; parts off the canvas are cropped."""
    height, width = patch.shape
    top, left = corner
    if max(top, left) >= len(canvas):
        return
    rows = slice(max(top, 0), min(top + height, len(canvas)))
    columns = slice(max(left, 0), min(left + width, len(canvas)))
    seen = patch[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    np.maximum(canvas[rows, columns], seen, out=canvas[rows, columns])
