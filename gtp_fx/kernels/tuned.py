"""Tiles that were timed on this machine's GPU, in the user's cache: written by `gtp-fx tune`, read whenever attention is traced."""

from __future__ import annotations

import functools
import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from gtp_fx.cache import cache_folder, keep_json
from gtp_fx.errors import OptionError
from gtp_fx.kernels.tiles import AttentionTile, attention_tiles, power_of_two
from gtp_fx.progress import Progress
from gtp_fx.timing import clock_for, interleave

_VERSION = 2
SIZES = ((64, 32), (128, 64), (197, 64), (577, 64), (1370, 64), (197, 80), (4096, 64))
"""Keys and head sizes that are timed; each stands for all whose next powers of two are the same."""
_QUERIES_IN_ALL = 2**19
"""Of all images and heads together: enough to fill a large GPU."""


def best_tile(keys: int, head: int, dtype: torch.dtype, device: torch.device) -> AttentionTile:
    """What was measured for this GPU and such a size, or else what is usually good."""
    usual = attention_tiles(keys, head, dtype)[0]
    if device.type != "cuda" or not torch.cuda.is_available():
        return usual
    return measured_tiles(torch.cuda.get_device_name(device)).get(tile_key(keys, head, dtype), usual)


@functools.cache
def measured_tiles(gpu: str) -> Mapping[str, AttentionTile]:
    """By size; empty where none were measured. A file that can't be read counts as none."""
    try:
        found = json.loads(_file(gpu).read_text())
        if found["version"] != _VERSION:
            return {}
        return {size: AttentionTile(*tile) for size, tile in found["tiles"].items()}
    except (OSError, ValueError, KeyError, TypeError, OptionError):
        return {}


def tune_tiles(
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    sizes: Sequence[tuple[int, int]] = SIZES,
    rounds: int = 9,
    progress: Progress | None = None,
) -> dict[str, AttentionTile]:
    """Time every tile that is worth it, for each of `sizes`, and return the fastest by size."""
    from gtp_fx.kernels.attention import attend

    done, found = 0, {}
    for keys, head in sizes:
        candidates = attention_tiles(keys, head, dtype)
        heads = max(1, _QUERIES_IN_ALL // keys) if device.type == "cuda" else 1
        q, k, v = torch.randn(1, keys, 3, heads, head, device=device).to(dtype).permute(2, 0, 3, 1, 4)
        scales = torch.ones(1, keys - 1, device=device)
        runs = {}
        for tile in candidates:
            arguments = (q, k, v, None, scales, None, None, "mixed-max", 1, 0, tile.arguments)
            run = functools.partial(attend, *arguments)
            try:
                run()  # compiles
            except triton.runtime.errors.OutOfResources:
                continue
            runs[tile] = run
            done += 1
            if progress is not None:
                progress(f"attention of {keys} keys", done, len(sizes) * len(candidates))
        timings = interleave({str(tile): run for tile, run in runs.items()}, rounds=rounds, clock=clock_for(device))
        taken = {tile: statistics.median(timings.seconds[str(tile)]) for tile in runs}
        found[tile_key(keys, head, dtype)] = min(taken, key=taken.__getitem__)
    return found


def save_tiles(gpu: str, tiles: Mapping[str, AttentionTile]) -> Path:
    """Keep them for this GPU, beside those of other sizes; returns the file."""
    file = _file(gpu)
    merged = {**measured_tiles(gpu), **tiles}
    value: dict[str, Any] = {"version": _VERSION, "gpu": gpu, "triton": triton.__version__}
    keep_json(file, {**value, "tiles": {size: tile.arguments for size, tile in merged.items()}})
    measured_tiles.cache_clear()
    return file


def tile_key(keys: int, head: int, dtype: torch.dtype) -> str:
    """What a tile is kept by: sizes whose next powers of two are the same share one."""
    return f"{power_of_two(keys)} {power_of_two(head)} {dtype}"


def _file(gpu: str) -> Path:
    digest = hashlib.sha256(f"{gpu}, triton {triton.__version__}".encode()).hexdigest()[:16]
    return cache_folder() / "tiles" / f"{digest}.json"
