"""Times of kernels' tiles: attention's at the nets' counts of tokens, and the stream's at a site.

The best tile of attention is saved where `gtp_fx.kernels.tuned` finds it, so that models compiled afterwards use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from bench.gpu_kernels import DRY, NETS, KernelRow, KernelSizes, Made, Question, attend, question
from gtp_fx.kernels.tiles import AttentionTile
from gtp_fx.kernels.tuned import save_tiles, tile_key
from gtp_fx.measure.site_probes import propagation

FITTING = ((32, 256, 4, 1), (32, 256, 8, 1), (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 4, 3))
TILED = ((128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 4), (128, 32, 4, 3))
"""Tiles (queries, keys, warps, stages) for up to 256 keys, and for more."""
STREAM = ((1, 1), (1, 2), (2, 4), (4, 4))
"""Tiles (rows, warps) of propagation."""
CALLS = {"told": "none", "plain": "none", "told, scored": "mixed-max"}


def questions(what: str, device: torch.device, dtype: torch.dtype, small: bool) -> list[Question]:
    """Return the rows to time.

    A contender's name is the call and the tile, such as "told (32, 256, 4, 1)".

    what: a number of tokens, or "propagate".
    small: whether to use toy sizes.
    """
    sizes = DRY if small else NETS
    if what == "propagate":
        return [question("propagate", size, _stream(size, device, dtype), device) for size in sizes.streams]
    return [
        question("attend", size, _attention(size, device, dtype), device)
        for size in _attentions(int(what), sizes, small)
    ]


def _attentions(tokens: int, sizes: KernelSizes, small: bool) -> Sequence[tuple[int, ...]]:
    """Return the size of the largest net with this count of tokens, or the toy sizes."""
    return sizes.attention if small else [size for size in sizes.attention if size[2] == tokens][-1:]


def keep_best(row: KernelRow, device: torch.device, dtype: torch.dtype) -> str:
    """Save the tile in which attention with token scales, with and without scores, is fastest. Return it as text."""
    *_, tokens, head = row.size
    taken = {
        tile: sum(row.seconds[f"{call} {tile}"] for call in ("told", "told, scored"))
        for tile in (*FITTING, *TILED)
        if all(f"{call} {tile}" in row.seconds for call in ("told", "told, scored"))
    }
    if not taken:
        return "none: no tile ran"
    best = min(taken, key=taken.__getitem__)
    if device.type == "cuda":
        save_tiles(torch.cuda.get_device_name(device), {tile_key(tokens, head, dtype): AttentionTile(*best)})
    return str(best)


def _attention(size: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Made:
    images, heads, tokens, head = size
    q, k, v = torch.randn(images, tokens, 3, heads, head, device=device).to(dtype).permute(2, 0, 3, 1, 4)
    scales = torch.ones(images, tokens - 1, device=device)
    return {
        f"{name} {tile}": partial(attend, q, k, v, None if name == "plain" else scales, score, list(tile))
        for tile in (FITTING if tokens <= 256 else TILED)
        for name, score in CALLS.items()
    }, {}


def _stream(size: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Made:
    images, patches, channels, removed = size
    x = torch.randn(images, patches, channels, device=device).to(dtype)
    runs = {}
    for tile in STREAM:
        function, *arguments = propagation(x, removed, tile)
        runs[str(tile)] = partial(function, *arguments)
    return {**runs}, {}
