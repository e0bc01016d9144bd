"""Work of scoring, which every strategy that reads scores has in common."""

from __future__ import annotations

from typing import Any

import torch

from gtp_fx.strategies.sites import SiteShape
from gtp_fx.targets.work import Work

FLOAT = 4
"""Bytes of a value that is float32 whatever the stream's dtype: maps, scores, weights."""


def scoring_works(score: str, heads: int, queries: Any, keys: Any, images: int, dtype: str) -> list[Work]:
    """Return what scoring adds to one attention.

    Column sums of the map are a product; its diagonal and its first row are only read. Both need the map in memory.

    score: a name in `gtp_fx.ops.attention.SCORES`, or "none".
    """
    if score == "none":
        return []
    entries = images * heads * queries * keys
    flops = 2 * entries if score.startswith(("mixed", "broadcast")) else 0
    return [Work("scores", flops, FLOAT * entries, dtype=dtype, launches=2)]


_SCORE_TILE = 64
"""Queries and keys of one tile of the score kernel."""


def kernel_scoring_works(score: str, site: SiteShape) -> list[Work]:
    """Return what scoring adds to one attention where `gtp_fx.kernels.scores` does it.

    The kernel runs after attention that returns its log-sum-exp. It recomputes the map's entries in registers, in whole
    tiles, and writes one number for each head and key.
    """
    if score == "none":
        return []
    tokens = site.others + site.patches_in
    tiles = -(-tokens // _SCORE_TILE)
    padded = site.images * site.heads * (tiles * _SCORE_TILE) ** 2
    sums = site.images * site.heads * tokens
    return [
        Work("scores", 2 * padded * site.key_features, FLOAT * padded, dtype=site.dtype),
        Work("stream", bytes=3 * FLOAT * sums),  # the reduction over heads: two factors are written, then read
    ]


def rows_moved(site: SiteShape) -> Any:
    """Return the bytes that a site moves where it is made of operators of its own.

    It then separates a residual add from the norm that would otherwise share its kernel. The sum is written, read to be
    shortened, and the shorter stream is written.
    """
    tokens_in, tokens_out = site.others + site.patches_in, site.others + site.patches_out
    return getattr(torch, site.dtype).itemsize * site.images * (2 * tokens_in + tokens_out) * site.channels
