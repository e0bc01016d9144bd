"""Tuning of the attention kernel's tiles on the current GPU, for `gtp-fx tune`."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence

import torch
import triton

from gtp_fx.kernels.attention import attend
from gtp_fx.kernels.tiles import AttentionTile, attention_tiles
from gtp_fx.kernels.tuned import save_tiles, tile_key
from gtp_fx.measure.timing import clock_for, interleave
from gtp_fx.options.progress import Progress

SIZES = ((64, 32), (128, 64), (197, 64), (577, 64), (1370, 64), (197, 80), (4096, 64))
"""Timed pairs (keys, features per head). Each stands for all pairs that round up to the same powers of two."""
_QUERIES_IN_ALL = 2**19
"""Queries over all images and heads: enough to fill a large GPU."""


def tune_tiles(
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    sizes: Sequence[tuple[int, int]] = SIZES,
    rounds: int = 9,
    progress: Progress | None = None,
) -> dict[str, AttentionTile]:
    """Time every plausible tile for each of `sizes`, and return the fastest one by `tile_key`.

    sizes: pairs (keys, features per head).
    rounds: rounds of timing; each runs every tile once.
    """
    done, found = 0, {}
    for keys, head in sizes:
        candidates = attention_tiles(keys, head, dtype)
        heads = max(1, _QUERIES_IN_ALL // keys) if device.type == "cuda" else 1
        q, k, v = torch.randn(1, keys, 3, heads, head, device=device).to(dtype).permute(2, 0, 3, 1, 4)
        scales = torch.ones(1, keys - 1, device=device)
        runs = {}
        for tile in candidates:
            arguments = (q, k, v, None, scales, None, "mixed-max", 1, 0, tile.arguments)
            run = functools.partial(attend, *arguments)
            try:
                run()  # compiles
            except triton.runtime.errors.OutOfResources:  # this GPU has too little shared memory for the tile
                continue
            runs[tile] = run
            done += 1
            if progress is not None:
                progress(f"attention of {keys} keys", done, len(sizes) * len(candidates))
        timings = interleave({str(tile): run for tile, run in runs.items()}, rounds=rounds, clock=clock_for(device))
        taken = {tile: statistics.median(timings.seconds[str(tile)]) for tile in runs}
        found[tile_key(keys, head, dtype)] = min(taken, key=taken.__getitem__)
    return found


def tune_kernels(device: torch.device, dtype: torch.dtype, rounds: int, progress: Progress | None = None) -> None:
    """Time the tiles of GTP's kernels on a GPU that has kernels, and save the fastest in the user's cache."""
    save_tiles(torch.cuda.get_device_name(device), tune_tiles(device, dtype, rounds=rounds, progress=progress))
