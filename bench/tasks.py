"""What small nets are trained for and judged by: a task draws canvases with labels, has a loss, and scores outputs.

digits     which digit is whole, among clutter                          one label a canvas, accuracy
scenes     which digit stands on stripes, among digits on textures      one label a canvas, accuracy
patches    which patches show the whole digit, and which digit          one label a patch, mean intersection over union
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.digits import CLASSES, Look, Split, canvases, patch_labels
from bench.scenes import CELL, scenes

Draw = Callable[[Split, int, int, Look, int], tuple[Tensor, Tensor]]
"""Function of a split, a seed, how many canvases, their look and a patch's side. It returns canvases [n, 1, side, side]
and labels [n] or [n, patches]."""


@dataclass(frozen=True)
class Task:
    """name: in `TASKS`. classes: of the output. per_patch: whether a label is a patch's. draw: canvases and labels."""

    name: str
    classes: int
    per_patch: bool
    draw: Draw

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the cross entropy of [n, classes] or [n, patches, classes].

        Of patches, those with a digit together weigh as much as all others.
        """
        if not self.per_patch:
            return F.cross_entropy(outputs, labels)
        weights = outputs.new_ones(self.classes)
        weights[0] = 0.2
        return F.cross_entropy(outputs.flatten(0, 1), labels.flatten(), weight=weights)

    def score(self, outputs: Tensor, labels: Tensor) -> float:
        """In [0, 1]: accuracy, or the mean over classes of intersection / union, each over all canvases together."""
        found = outputs.argmax(dim=-1)
        if not self.per_patch:
            return float((found == labels).double().mean())
        shares = []
        for label in range(self.classes):
            mine, theirs = found == label, labels == label
            if union := int((mine | theirs).sum()):
                shares.append(int((mine & theirs).sum()) / union)
        return sum(shares) / len(shares)


def _close_scene(split: Split, seed: int, n: int, look: Look, patch: int) -> tuple[Tensor, Tensor]:
    """A scene too small for several cells is one digit on its texture."""
    return scenes(split, seed, n, replace(look, pieces=min(look.pieces, (look.side // CELL) ** 2 - 1)))


TASKS = {
    task.name: task
    for task in (
        Task("digits", CLASSES, False, lambda split, seed, n, look, _: canvases(split, seed, n, look)),
        Task("scenes", CLASSES, False, _close_scene),
        Task("patches", CLASSES + 1, True, patch_labels),
    )
}


def unlabelled(task: Task, n: int, look: Look, patch: int, seed: int = 0) -> Tensor:
    """Canvases of the calibration split, whose digits neither training nor tests show."""
    return task.draw(Split.calibration, seed, n, look, patch)[0]


def outputs_of(model: torch.nn.Module, images: Tensor, batch: int = 100) -> Tensor:
    """A model's outputs, a batch at a time, without gradients."""
    with torch.no_grad():
        return torch.cat([model(part) for part in images.split(batch)])
