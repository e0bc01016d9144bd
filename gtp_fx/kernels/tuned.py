"""Tiles that were timed on this machine's GPU, in the user's cache: written by `gtp-fx tune`, read whenever attention is traced."""

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
