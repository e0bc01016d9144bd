"""Where what takes long to measure is kept between runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """$GTP_FX_CACHE, or gtp_fx in the user's cache folder, as the system has one. It need not exist yet."""
    if set_by_user := os.environ.get("GTP_FX_CACHE"):
        return Path(set_by_user)
    import platformdirs  # a bare checkout runs without it, where the variable is set

    return platformdirs.user_cache_path("gtp_fx", appauthor=False)


def keep_json(file: Path, value: Any) -> None:
    """Write `value` to `file`, whose folders are made, at once: another process may be reading."""
    file.parent.mkdir(parents=True, exist_ok=True)
    written = file.with_suffix(f".{os.getpid()}")
    written.write_text(json.dumps(value, indent=2) + "\n")
    written.replace(file)
