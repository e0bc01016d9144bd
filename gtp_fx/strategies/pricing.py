"""What scoring costs, whichever strategy asks for scores."""

from __future__ import annotations

from typing import Any

from gtp_fx.cost.work import Work

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
