"""Sizes of the ViT, and what a part is.

B images, N tokens, C channels, H heads, D features of a head, P = side * side pixels of a patch
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

SIDE, GRID, CHANNELS, HEADS, DEPTH = 4, 6, 24, 3, 4
TOKENS, FEATURES = GRID * GRID + 1, CHANNELS // HEADS

Part = Mapping[str, Callable[..., Any]]
"""The spellings of a part by their names; the first one is the canonical one."""
