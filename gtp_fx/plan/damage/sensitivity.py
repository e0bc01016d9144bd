"""Measured damage: how far the outputs move when one block alone removes tokens."""

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
"""How far measured damage is off, as `Damage.uncertainty`.

Damage measured block by block was a factor of 1.15 to 1.65 (one standard deviation; geometric mean 1.4) off the
divergence of whole schedules on unseen images (`bench/results/expected_damage.json`)."""


def measured_damage(
    gm: fx.GraphModule,
    sites: Sequence[Site],
    shapes: Sequence[BlockShape],
    strategy: Strategy,
    calibration: Calibration,
    judged: Callable[[tuple[int, ...], Strategy], float],
    progress: Progress | None = None,
) -> Damage:
    """Measure the damage of each site at `calibration.points` counts; in between, it is interpolated.

    gm: the graph after the exact passes, with its parameters.
    calibration: bound to the model's calls. With `cache`, measurements are read from and written to the cache folder.
    judged: returns how far outputs move, from the tokens removed at each site and the strategy.
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
    """Return how many of `whole` tokens to remove in each measurement, with closer counts where few tokens remain."""
    shares = 1 - np.linspace(1, 0, points + 1)[1:] ** 1.5
    return sorted({max(1, min(whole - 1, round(float(share) * (whole - 1)))) for share in shares})


def _measure(
    sites: Sequence[Site],
    points: int,
    judged: Callable[[tuple[int, ...]], float],
    progress: Progress | None,
) -> list[list[tuple[int, float]]]:
    """Return (tokens removed, how far the outputs moved) pairs for each site, which removes them alone."""
    planned = [counts_to_measure(site.whole, points) for site in sites]
    total, done = sum(map(len, planned)), 0
    found: list[list[tuple[int, float]]] = []
    for place, counts in enumerate(planned):
        found.append([])
        for count in counts:
            if progress is not None:
                progress(f"block {sites[place].block}: {count} tokens removed", done, total)
            only = tuple(count if i == place else 0 for i in range(len(sites)))
            found[-1].append((count, judged(only)))
            done += 1
    return found


def _table(whole: int, points: Sequence[tuple[int, float]]) -> Table:
    """Return [whole] the damage by tokens removed, made to ascend by a running maximum over the measured values."""
    removed = [0, *(count for count, _ in points)]
    values = np.maximum.accumulate([0.0, *(value for _, value in points)])
    return np.interp(np.arange(whole), removed, values)


def _key(
    gm: fx.GraphModule,
    sites: Sequence[Site],
    shapes: Sequence[BlockShape],
    strategy: Strategy,
    calibration: Calibration,
) -> str:
    """Return a hash of what a measurement depends on: the graph, its weights, the images and the strategy."""
    digest = hashlib.sha256()
    parts = (_VERSION, calibration.points, str(strategy), strategy.code, tuple(shapes), [site.block for site in sites])
    digest.update(repr(parts).encode())
    digest.update(gm.code.encode())
    # Hashing every element of a large model would take long: each tensor gives its sum and some of its elements.
    for tensor in [*gm.state_dict().values(), *pytree.tree_leaves(calibration.images)]:
        if isinstance(tensor, Tensor):
            digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().double().sum().cpu().numpy().tobytes())
            digest.update(_some(tensor).double().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def _some(tensor: Tensor, most: int = 4096) -> Tensor:
    """Return about `most` elements of a tensor, evenly spaced."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // most)]


def _cached(file: Path) -> list[list[tuple[int, float]]] | None:
    """Read measurements from a cache file; None where it is missing or unreadable."""
    try:
        data: Any = json.loads(file.read_text())
        return [[(int(count), float(value)) for count, value in site] for site in data["points"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
