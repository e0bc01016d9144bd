"""Tiles timed on this machine's GPU, in the user's cache.

`gtp-fx tune` writes them, and they are read whenever attention is traced.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import triton

from gtp_fx.errors import OptionError
from gtp_fx.kernels.tiles import AttentionTile, attention_tiles, power_of_two
from gtp_fx.targets.cache import cache_folder, keep_json

_VERSION = 2


def best_tile(keys: int, head: int, dtype: torch.dtype, device: torch.device) -> AttentionTile:
    """Return the tile measured for this GPU and size, or else the one that is usually good.

    head: the larger of the head sizes of queries and values.
    """
    usual = attention_tiles(keys, head, dtype)[0]
    if device.type != "cuda" or not torch.cuda.is_available():
        return usual
    return measured_tiles(torch.cuda.get_device_name(device)).get(tile_key(keys, head, dtype), usual)


@functools.cache
def measured_tiles(gpu: str) -> Mapping[str, AttentionTile]:
    """Return a GPU's measured tiles by `tile_key`, empty where there are none. An unreadable file counts as none."""
    try:
        found = json.loads(_file(gpu).read_text())
        if found["version"] != _VERSION:
            return {}
        return {size: AttentionTile(*tile) for size, tile in found["tiles"].items()}
    except (OSError, ValueError, KeyError, TypeError, OptionError):
        return {}


def save_tiles(gpu: str, tiles: Mapping[str, AttentionTile]) -> Path:
    """Save tiles, by `tile_key`, for a GPU, beside those of other sizes. Return the file."""
    file = _file(gpu)
    merged = {**measured_tiles(gpu), **tiles}
    value: dict[str, Any] = {"version": _VERSION, "gpu": gpu, "triton": triton.__version__}
    keep_json(file, {**value, "tiles": {size: tile.arguments for size, tile in merged.items()}})
    measured_tiles.cache_clear()
    return file


def tile_key(keys: int, head: int, dtype: torch.dtype) -> str:
    """Return the key under which a tile is saved: sizes with the same next powers of two share one."""
    return f"{power_of_two(keys)} {power_of_two(head)} {dtype}"


def _file(gpu: str) -> Path:
    """Return the file of a GPU's tiles: another Triton version has another file."""
    digest = hashlib.sha256(f"{gpu}, triton {triton.__version__}".encode()).hexdigest()[:16]
    return cache_folder() / "tiles" / f"{digest}.json"
