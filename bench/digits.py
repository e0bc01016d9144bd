"""Handwritten digits on cluttered canvases: a data set that comes with scikit-learn, for nets that train in minutes.

A canvas holds one whole digit (8 x 8 pixels in scikit-learn's set, drawn at twice the size and more) at a random place, among
cut-out pieces of other digits, strokes and noise. The label is the whole digit's. Most patches are background, as in
photographs; what is a digit and what a piece of one only shows over several patches. Splits share no digit image.
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
"""Of the digit images: train, calibration, test."""
_NEAREST_PIECE = 4
"""Pixels from the digit's box that the middle of a piece of clutter keeps away, so that no label is made unreadable."""
_INK, _COVERED = 0.3, 0.1
"""What of a pixel's brightness is ink, and the part of a patch that a digit's ink has to cover for the patch to show it."""
_TRIES = 1000
"""To find such a place; a canvas little larger than its digit has none."""


class Split(enum.IntEnum):
    """Which digit images a canvas may show; pieces of clutter are cut from the same ones."""

    train = 0
    calibration = 1
    test = 2


@dataclass(frozen=True)
class Look:
    """What a canvas looks like.

    side: of the canvas, in pixels. smallest, largest: a digit's side. pieces, strokes: how many of each lie about.
    noise: standard deviation of what is added to every pixel, whose values are from 0 to 1. raster, jitter: a digit's corner
    lies up to `jitter` pixels right of and below a multiple of `raster`; anywhere at all takes far longer to learn.
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
    """`n` canvases [n, 1, side, side] and their labels [n], the same for the same arguments; pixels are centred and scaled."""
    look = look or Look()
    drawn = _drawn(split, seed, n, look)
    return as_images([canvas for canvas, _, _ in drawn]), torch.tensor([label for _, _, label in drawn])


def patch_labels(split: Split, seed: int, n: int, look: Look, patch: int) -> tuple[Tensor, Tensor]:
    """The same canvases, and a label a patch, [n, patches]: 0 where no digit is, d + 1 where ink of the whole digit d covers
    a `_COVERED` part or more of the patch. Pieces, strokes and noise are no digit."""
    drawn = _drawn(split, seed, n, look)
    ink = torch.from_numpy(np.stack([ink for _, ink, _ in drawn]))[:, None]
    digit = torch.tensor([label for _, _, label in drawn])[:, None] + 1
    covered = F.avg_pool2d((ink > _INK).float(), patch).flatten(1) >= _COVERED
    return as_images([canvas for canvas, _, _ in drawn]), torch.where(covered, digit, 0)


def as_images(drawn: Sequence[Pixels]) -> Tensor:
    """[n, 1, side, side], centred and scaled."""
    return (torch.from_numpy(np.stack(drawn))[:, None] - 0.1) / 0.3


def _drawn(split: Split, seed: int, n: int, look: Look) -> list[tuple[Pixels, Pixels, int]]:
    """Each canvas, the ink of its whole digit alone, and its label."""
    chance = np.random.default_rng((int(split), seed))
    pool = digit_indices(split)
    shown = chance.choice(pool, n)
    return [(*_canvas(int(index), pool, look, chance), int(digits()[1][index])) for index in shown]


@functools.cache
def digit_indices(split: Split) -> NDArray[np.int64]:
    """The digit images of a split, by their places in scikit-learn's set."""
    count = len(digits()[1])
    bounds = np.cumsum(np.array([0, *_SHARES]) * count).round().astype(int)
    order = np.random.default_rng(0).permutation(count)
    return order[bounds[split] : bounds[split + 1]]


@functools.cache
def digits() -> tuple[Pixels, NDArray[np.int64]]:
    """Images [1797, 8, 8] of values from 0 to 1, and labels."""
    found = load_digits()
    return (found.images / 16).astype(np.float32), found.target.astype(np.int64)


@functools.cache
def enlarged(side: int) -> Pixels:
    """Every digit image at another size."""
    images = torch.from_numpy(digits()[0])[:, None]
    return np.asarray(F.interpolate(images, size=(side, side), mode="bilinear")[:, 0])


def _canvas(index: int, pool: NDArray[np.int64], look: Look, chance: np.random.Generator) -> tuple[Pixels, Pixels]:
    """The canvas, and its whole digit alone."""
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
    """Where a digit begins, down or across."""
    places = (look.side - side - look.jitter) // look.raster + 1
    return int(chance.integers(0, places)) * look.raster + int(chance.integers(0, look.jitter + 1))


def _piece(digit: Pixels, chance: np.random.Generator) -> Pixels:
    """About a quarter of a digit."""
    side = len(digit)
    height, width = (int(size) for size in chance.integers(side // 3, side * 2 // 3 + 1, 2))
    top, left = int(chance.integers(0, side - height + 1)), int(chance.integers(0, side - width + 1))
    return digit[top : top + height, left : left + width]


def stroke(length: int, chance: np.random.Generator) -> Pixels:
    """A straight line, two pixels wide, in a box of its own."""
    slope = float(chance.uniform(-1, 1))
    box = np.zeros((length, length), np.float32)
    along = np.arange(length)
    across = np.clip((length / 2 + slope * (along - length / 2)).astype(int), 0, length - 2)
    box[along, across] = box[along, across + 1] = float(chance.uniform(0.6, 1))
    return box.T if chance.random() < 0.5 else box


def _away_from(top: int, left: int, side: int, canvas: int, chance: np.random.Generator) -> tuple[int, int]:
    """Where a piece of clutter begins: its middle is a margin away from the digit. Off the canvas where there is no room."""
    for _ in range(_TRIES):
        y, x = (int(at) for at in chance.integers(0, canvas, 2))
        near_y = top - _NEAREST_PIECE <= y < top + side + _NEAREST_PIECE
        near_x = left - _NEAREST_PIECE <= x < left + side + _NEAREST_PIECE
        if not (near_y and near_x):
            return y - side // 4, x - side // 4
    return canvas, canvas


def put(canvas: Pixels, patch: Pixels, corner: tuple[int, int]) -> None:
    """Draw `patch` with its corner there, in place; the brighter of two strokes wins, what lies outside is cut off."""
    height, width = patch.shape
    top, left = corner
    if max(top, left) >= len(canvas):
        return
    rows = slice(max(top, 0), min(top + height, len(canvas)))
    columns = slice(max(left, 0), min(left + width, len(canvas)))
    seen = patch[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    np.maximum(canvas[rows, columns], seen, out=canvas[rows, columns])
