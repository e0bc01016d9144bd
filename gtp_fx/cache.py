"""Where what takes long to measure is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$GTP_FX_CACHE, or gtp_fx in the user's cache folder ($XDG_CACHE_HOME, ~/.cache). It need not exist yet."""
    if own := os.environ.get("GTP_FX_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gtp_fx"
