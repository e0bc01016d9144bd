"""Stages as processes: all get ready side by side, then each has the GPU to itself, and no more time than there is.

What takes a GPU's time is compiling, on the host: so a stage compiles first, says that it is ready, and waits for its
turn. In a turn nothing else runs; who is still getting ready is halted meanwhile. A stage that crashes, hangs or comes
too late costs itself alone.

`Turn` is a stage's side; `bench.gpu_rounds` has the other, of who starts them. They speak by files in one folder, and
neither imports torch:

    found/NAME.json    what a stage has found so far, written anew after every row
    turns/NAME.ready   it is ready
    turns/NAME.go      its turn: seconds that it has
    logs/NAME.txt      what it printed
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POLL = 0.05
NO_LIMIT = 1e9
LEFT_OUT = "left out"
FOLDERS = ("found", "turns", "logs")


@dataclass(frozen=True)
class Stage:
    """name: also its files'. command: what runs it. least: seconds without which it isn't begun. limit: seconds of its
    turn at most.

    waits: whether it asks for a turn; one that doesn't runs through as it is started. prepare: seconds until it has to
    be ready, or, where it doesn't wait, be done; the time in which it is halted doesn't count.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    least: float
    prepare: float
    waits: bool = True


@dataclass(frozen=True)
class Outcome:
    """trouble: why a stage gave nothing or not all, in a few words; empty for one that is done. seconds: until it was
    ready, and its turn's."""

    stage: str
    trouble: str
    seconds: tuple[float, float]

    @property
    def failed(self) -> bool:
        """It was begun and came to nothing good, where one that is left out was not."""
        return bool(self.trouble) and not self.trouble.startswith(LEFT_OUT)


class Turn:
    """A stage's own side. In `wait` it lets others go first; what it finds is kept at once, so that it can be stopped
    at any time."""

    def __init__(self, folder: Path, name: str, alone: bool = False) -> None:
        """alone: nobody gives turns; go on at once, with no limit."""
        self._found = folder / "found" / f"{name}.json"
        self._ready, self._go = (folder / "turns" / f"{name}.{end}" for end in ("ready", "go"))
        self._alone = alone
        self._until = time.monotonic() + NO_LIMIT

    def wait(self) -> None:
        if self._alone:
            return
        self._ready.touch()
        while not self._go.exists():
            time.sleep(POLL / 2)
        self._until = time.monotonic() + float(self._go.read_text())

    @property
    def left(self) -> float:
        """Seconds."""
        return self._until - time.monotonic()

    def keep(self, found: Mapping[str, Any]) -> None:
        write_whole(self._found, json.dumps(found, indent=1))


def write_whole(file: Path, text: str) -> None:
    """All of it or nothing: somebody may be reading, or end us."""
    file.parent.mkdir(parents=True, exist_ok=True)
    written = file.with_name(f"{file.name}.{os.getpid()}")
    written.write_text(text)
    written.replace(file)
