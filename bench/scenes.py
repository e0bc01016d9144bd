"""A harder task from the same digits: several stand on patches of texture, and the texture marks the one to classify.

A canvas is cells of a raster. Some cells hold a digit on a square of texture (stripes, checks or dots, of any phase);
exactly one of those is striped, and its digit is the label. So texture, shape and grouping all count, and no part of
the canvas gives the label alone. Strokes and noise as in `bench.digits`; splits share no digit image.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bench.digits import Look, Pixels, Split, as_images, digit_indices, digits, enlarged, put, stroke

CELL = 24
"""Side of a cell, in pixels: a square of texture, and the digit in it."""
_PAPER = 0.45
"""Brightest texture; a digit's ink is up to 1."""
MEANT, OTHERS = "stripes", ("checks", "dots")

LOOK = Look(side=72, smallest=18, largest=20, pieces=2, strokes=3, noise=0.1, raster=CELL, jitter=4)
"""Nine cells, three of which hold a digit: `pieces` are the other digits."""


def scenes(split: Split, seed: int, n: int, look: Look = LOOK) -> tuple[Tensor, Tensor]:
    """`n` canvases [n, 1, side, side] and their labels [n], the same for the same arguments."""
    chance = np.random.default_rng((int(split), seed, CELL))
    pool = digit_indices(split)
    drawn, labels = [], []
    for _ in range(n):
        shown = chance.choice(pool, look.pieces + 1)
        drawn.append(_scene([int(index) for index in shown], look, chance))
        labels.append(int(digits()[1][shown[0]]))
    return as_images(drawn), torch.tensor(labels)


def texture(kind: str, side: int, chance: np.random.Generator) -> Pixels:
    """A square of it, from 0 to `_PAPER`."""
    rows, columns = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    down, across = (int(shift) for shift in chance.integers(0, 4, 2))
    if kind == "stripes":
        sign = 1 if chance.random() < 0.5 else -1
        pattern = ((rows + sign * columns + down) % 4) < 2
    elif kind == "checks":
        pattern = ((rows + down) // 2 + (columns + across) // 2) % 2 == 0
    else:
        pattern = ((rows + down) % 4 == 0) & ((columns + across) % 4 == 0)
    return (pattern * _PAPER).astype(np.float32)


def _scene(shown: list[int], look: Look, chance: np.random.Generator) -> Pixels:
    """shown: digit images, the one that is meant first."""
    canvas = np.zeros((look.side, look.side), np.float32)
    for _ in range(look.strokes):
        corner = (int(chance.integers(0, look.side)), int(chance.integers(0, look.side)))
        put(canvas, stroke(look.smallest // 2, chance), corner)
    cells = look.side // CELL
    for number, place in enumerate(chance.permutation(cells**2)[: len(shown)]):
        kind = MEANT if number == 0 else str(chance.choice(OTHERS))
        top, left = (int(at) * CELL for at in divmod(int(place), cells))
        canvas[top : top + CELL, left : left + CELL] = texture(kind, CELL, chance)
        side = int(chance.integers(look.smallest, look.largest + 1))
        inset = [int(at) for at in chance.integers(0, look.jitter + 1, 2)]
        put(canvas, enlarged(side)[shown[number]], (top + inset[0], left + inset[1]))
    return canvas + look.noise * chance.standard_normal(canvas.shape, np.float32)
