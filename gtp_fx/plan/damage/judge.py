"""Judging plans by how far they move outputs on unlabelled images. No judgment is made twice, not even in two runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from gtp_fx.options.calibration import Calibration, Call
from gtp_fx.plan.damage.divergence import divergence
from gtp_fx.plan.damage.kept import Kept
from gtp_fx.plan.plan import Plan

ApplyPlan = Callable[[fx.GraphModule, Plan], fx.GraphModule]
"""Return a new graph that applies a plan, for one evaluation; the graph passed in is unchanged."""

_FIRST = 8
"""Images of the first part. Each further part doubles the images so far."""


@dataclass(frozen=True, eq=False)
class Part:
    """Some of the images: a call, how many images it has, and the original's output."""

    call: Call
    images: int
    wanted: Any


@dataclass(frozen=True, eq=False)
class Judge:
    """Judges plans for one graph on calibration images, on all of them or on the first.

    gm: the graph after the exact passes, with its parameters.
    apply_plan: returns the graph that a plan gives.
    parts: the images.
    kept: judgments made already.
    """

    gm: fx.GraphModule
    apply_plan: ApplyPlan
    parts: tuple[Part, ...]
    kept: Kept

    @classmethod
    def of(cls, gm: fx.GraphModule, calibration: Calibration, apply_plan: ApplyPlan) -> Judge:
        """Make a judge by running the original once on every image. calibration: bound to the model's calls."""
        calls = list(_split(calibration.images))
        with torch.no_grad():
            parts = tuple(Part((args, kwargs), count, gm(*args, **kwargs)) for (args, kwargs), count in calls)
        return cls(gm, apply_plan, parts, Kept.of(gm, [call for call, _ in calls], calibration.cache))

    @property
    def images(self) -> int:
        """Return how many images there are."""
        return sum(part.images for part in self.parts)

    @property
    def rounds(self) -> tuple[int, ...]:
        """Return the numbers of first images that a plan can be judged on: 8, 16, … and all."""
        found, so_far, least = [], 0, _FIRST
        for part in self.parts:
            so_far += part.images
            if so_far >= least:
                found.append(so_far)
                least = 2 * so_far
        return (*found[: -1 if found and found[-1] == self.images else None], self.images)

    def __call__(self, plan: Plan, images: int | None = None) -> float:
        """Return the mean of `divergence` over the first `images` images, all where None; infinite where it is nan."""
        made: fx.GraphModule | None = None
        total, seen = 0.0, 0
        for number, part in enumerate(self.parts):
            if images is not None and seen >= images:
                break
            moved = self.kept.get(plan, number)
            if moved is None:
                made = made if made is not None else self.apply_plan(self.gm, plan)
                args, kwargs = part.call
                with torch.no_grad():
                    moved = divergence(made(*args, **kwargs), part.wanted)
                self.kept.put(plan, number, moved)
            total += part.images * moved
            seen += part.images
        mean = total / seen
        return mean if mean == mean else float("inf")


def _split(calls: Sequence[Call]) -> Iterator[tuple[Call, int]]:
    """Yield the calls, cut where the number of images so far has doubled, each with its number of images.

    A call whose tensors don't all hold as many images stays whole.
    """
    so_far, edge = 0, _FIRST
    for call in calls:
        sizes = [leaf.shape[0] for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor) and leaf.ndim]
        begin, end, alike = 0, sizes[0], len(set(sizes)) == 1
        while begin < end:
            stop = min(end, begin + edge - so_far) if alike else end
            yield (call if (begin, stop) == (0, end) else _slice(call, begin, stop)), stop - begin
            so_far += stop - begin
            begin = stop
            while so_far >= edge:
                edge *= 2


def _slice(call: Call, begin: int, end: int) -> Call:
    """Return some of a call's images."""
    some = pytree.tree_map(
        lambda leaf: leaf[begin:end] if isinstance(leaf, Tensor) and leaf.ndim else leaf, tuple(call)
    )
    return some[0], some[1]
