"""Damage measured: how far the outputs move when one block alone loses tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from gtp_fx.options.calibration import Calibration
from gtp_fx.options.progress import Progress
from gtp_fx.options.schedule import BlockShape
from gtp_fx.plan.damage.tables import Damage, Table
from gtp_fx.plan.site import Site
from gtp_fx.strategies import Strategy
from gtp_fx.targets.cache import cache_folder, keep_json

_VERSION = 1
_UNCERTAINTY = 0.4
"""Measured block by block, expected damage lay a factor of 1.15 to 1.65 off the divergence of whole schedules on unseen images (one standard
deviation; a geometric mean of 1.4, `bench/results/expected_damage.json`)."""


def measured_damage(
    gm: fx.GraphModule,
    sites: Sequence[Site],
    shapes: Sequence[BlockShape],
    strategy: Strategy,
    calibration: Calibration,
    judged: Callable[[tuple[int, ...], Strategy], float],
    progress: Progress | None = None,
) -> Damage:
    """Tables from `calibration.points` measurements at each site, monotone, interpolated between.

    gm: behind the exact passes, with its parameters. judged: how far outputs move, from the tokens that leave at each site.
    calibration: bound to the model's calls.
    """
    calls = calibration.images
    file = cache_folder() / "sensitivity" / f"{_key(gm, sites, shapes, strategy, calibration)}.json"
    points = _cached(file) if calibration.cache else None
    if points is None:
        points = _measure(sites, calibration.points, lambda counts: judged(counts, strategy), progress)
        if calibration.cache:
            keep_json(file, {"version": _VERSION, "torch": torch.__version__, "points": points})
    images = sum(len(next(t for t in pytree.tree_leaves(call) if isinstance(t, Tensor))) for call in calls)
    tables = tuple(_table(site.whole, own) for site, own in zip(sites, points, strict=True))
    return Damage(tables, f"measurement on {images} images", uncertainty=_UNCERTAINTY)


def counts_to_measure(whole: int, points: int) -> list[int]:
    """Of `whole` tokens, how many to take away: closer together where few are left."""
    shares = 1 - np.linspace(1, 0, points + 1)[1:] ** 1.5
    return sorted({max(1, min(whole - 1, round(float(share) * (whole - 1)))) for share in shares})


def _measure(
    sites: Sequence[Site],
    points: int,
    judged: Callable[[tuple[int, ...]], float],
    progress: Progress | None,
) -> list[list[tuple[int, float]]]:
    """For each site, (tokens gone, how far the outputs moved)."""
    asked = [counts_to_measure(site.whole, points) for site in sites]
    total, done = sum(map(len, asked)), 0
    found: list[list[tuple[int, float]]] = []
    for place, counts in enumerate(asked):
        found.append([])
        for count in counts:
            if progress is not None:
                progress(f"block {sites[place].block}: {count} tokens away", done, total)
            only = tuple(count if i == place else 0 for i in range(len(sites)))
            found[-1].append((count, judged(only)))
            done += 1
    return found


def _table(whole: int, points: Sequence[tuple[int, float]]) -> Table:
    """[whole]: damage by tokens gone. Measured values are made to ascend by the largest before each."""
    gone = [0, *(count for count, _ in points)]
    values = np.maximum.accumulate([0.0, *(value for _, value in points)])
    return np.interp(np.arange(whole), gone, values)


def _key(
    gm: fx.GraphModule,
    sites: Sequence[Site],
    shapes: Sequence[BlockShape],
    strategy: Strategy,
    calibration: Calibration,
) -> str:
    """Of everything that a measurement depends on: the graph, its weights, the images, the strategy."""
    digest = hashlib.sha256()
    said = (_VERSION, calibration.points, str(strategy), strategy.code, tuple(shapes), [site.block for site in sites])
    digest.update(repr(said).encode())
    digest.update(gm.code.encode())
    for tensor in [*gm.state_dict().values(), *pytree.tree_leaves(calibration.images)]:
        if isinstance(tensor, Tensor):
            digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().double().sum().cpu().numpy().tobytes())
            digest.update(_some(tensor).double().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def _some(tensor: Tensor, most: int = 4096) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // most)]


def _cached(file: Path) -> list[list[tuple[int, float]]] | None:
    try:
        data: Any = json.loads(file.read_text())
        return [[(int(count), float(value)) for count, value in site] for site in data["points"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
