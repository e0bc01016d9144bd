"""Where a result goes: to a file, or to stdout, as JSON. What a person reads meanwhile goes to stderr."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer


def publish(result: Mapping[str, Any], out: Path | None) -> None:
    """Write `result` to the file `out`, whose folders are made, or print it where `out` is None."""
    text = json.dumps(result, indent=2)
    if out is None:
        typer.echo(text)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text + "\n")
