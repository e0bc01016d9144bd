"""The user's cache, where results that take long to measure are kept between runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from gtp_fx.errors import warn


def cache_folder() -> Path:
    """Return $GTP_FX_CACHE, or gtp_fx in the user's cache folder. It need not exist yet."""
    if set_by_user := os.environ.get("GTP_FX_CACHE"):
        return Path(set_by_user)
    import platformdirs  # not needed where the variable is set, so a checkout with torch alone can run

    return platformdirs.user_cache_path("gtp_fx", appauthor=False)


def keep_json(file: Path, value: Any) -> None:
    """Write `value` to `file` at once, because another process may be reading; make its folders.

    Warns where that can't be done: a cache is a convenience.
    """
    written = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(json.dumps(value, indent=2) + "\n")
        written.replace(file)
    except OSError as error:
        warn(
            f"{file.name} can't be kept in {file.parent} ({error.strerror or error}), so the next run measures it "
            f"again; the environment variable GTP_FX_CACHE names another folder",
        )
