"""Where what takes long to measure is kept between runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """$GTP_FX_CACHE, or gtp_fx in the user's cache folder ($XDG_CACHE_HOME, ~/.cache). It need not exist yet."""
    if own := os.environ.get("GTP_FX_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gtp_fx"


def keep_json(file: Path, value: Any) -> None:
    """Write `value` to `file`, whose folders are made, at once: another process may be reading."""
    file.parent.mkdir(parents=True, exist_ok=True)
    written = file.with_suffix(f".{os.getpid()}")
    written.write_text(json.dumps(value, indent=2) + "\n")
    written.replace(file)
