"""What scoring costs, whichever strategy asks for scores."""

from __future__ import annotations

from typing import Any

import torch

from gtp_fx.strategies.protocol import SiteShape
from gtp_fx.targets.work import Work

FLOAT = 4
"""Bytes of what is computed in float32 whatever the stream's dtype: maps, scores, weights."""


def scoring_works(score: str, heads: int, queries: Any, keys: Any, images: int, dtype: str) -> list[Work]:
    """What attention by `score`, a name in `SCORES` or "none", adds to one attention.

    Column sums of the map are a product; its diagonal and its first row are read off. Either way the map is made.
    """
    if score == "none":
        return []
    entries = images * heads * queries * keys
    flops = 2 * entries if score.startswith(("mixed", "broadcast")) else 0
    return [Work("scores", flops, FLOAT * entries, dtype=dtype, launches=2)]


_SCORE_TILE = 64
"""Queries and keys that the score kernel looks at together."""


def kernel_scoring_works(score: str, site: SiteShape) -> list[Work]:
    """The same as `gtp_fx.kernels.scores` does it, behind attention that returns its log-sum-exp: the map's entries are made again in
    registers, in whole tiles, and a number a head and key is written."""
    if score == "none":
        return []
    tokens = site.others + site.patches_in
    tiles = -(-tokens // _SCORE_TILE)
    padded = site.images * site.heads * (tiles * _SCORE_TILE) ** 2
    sums = site.images * site.heads * tokens
    return [
        Work("scores", 2 * padded * site.key_features, FLOAT * padded, dtype=site.dtype),
        Work("stream", bytes=3 * FLOAT * sums),  # over heads: two factors written, then read
    ]


def rows_moved(site: SiteShape) -> Any:
    """Bytes of a site that stands, in operators of its own, between a residual add and the norm that would else run as one kernel: the
    sum is written out, then read to be shortened, and the shorter stream written."""
    tokens_in, tokens_out = site.others + site.patches_in, site.others + site.patches_out
    return getattr(torch, site.dtype).itemsize * site.images * (2 * tokens_in + tokens_out) * site.channels
