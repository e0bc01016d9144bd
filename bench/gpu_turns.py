"""Stages as processes, which prepare in parallel and then take turns alone on the GPU, within a time limit.

Most of the time on a GPU's machine goes into compiling on the host. So a stage compiles first, signals that it is
ready, and waits for its turn. During a turn nothing else runs: stages that still prepare are halted. A stage that
crashes, hangs or is late costs no other stage its result.

`Turn` is a stage's side; `bench.gpu_rounds` is the side that starts the stages. They communicate by files in one
folder, and neither imports torch:

    found/NAME.json    a stage's results so far, rewritten after every row
    turns/NAME.ready   it is ready
    turns/NAME.go      it is its turn; contains the seconds that it has
    logs/NAME.txt      its output
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
    """A stage and its time limits, in seconds.

    name: its name, and that of its files.
    command: command that runs it.
    limit: longest turn.
    least: least remaining time with which it, or its turn, is begun.
    prepare: longest preparation, or longest run where it doesn't wait; the time in which it is halted doesn't count.
    waits: whether it waits for a turn. Otherwise it runs to its end once it is started.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    least: float
    prepare: float
    waits: bool = True


@dataclass(frozen=True)
class Outcome:
    """How a stage ended.

    stage: its name.
    trouble: why it has no result, or not all of it, in a few words; "" where it completed.
    seconds: seconds of its preparation and of its turn.
    """

    stage: str
    trouble: str
    seconds: tuple[float, float]

    @property
    def failed(self) -> bool:
        """Return whether the stage was started and failed. One that was left out did not fail."""
        return bool(self.trouble) and not self.trouble.startswith(LEFT_OUT)


class Turn:
    """A stage's side of taking turns. Results are kept at once, so that a stage can be stopped at any time."""

    def __init__(self, folder: Path, name: str, alone: bool = False) -> None:
        """Make the turn of stage `name`. Where `alone`, nothing gives turns: `wait` returns at once, without limit."""
        self._found = folder / "found" / f"{name}.json"
        self._ready, self._go = (folder / "turns" / f"{name}.{end}" for end in ("ready", "go"))
        self._alone = alone
        self._until = time.monotonic() + NO_LIMIT

    def wait(self) -> None:
        """Signal that the stage is ready, and return when it has its turn."""
        if self._alone:
            return
        self._ready.touch()
        while not self._go.exists():
            time.sleep(POLL / 2)
        self._until = time.monotonic() + float(self._go.read_text())

    @property
    def left(self) -> float:
        """Return the remaining seconds of the turn."""
        return self._until - time.monotonic()

    def keep(self, found: Mapping[str, Any]) -> None:
        """Write the results so far."""
        write_whole(self._found, json.dumps(found, indent=1))


def write_whole(file: Path, text: str) -> None:
    """Write a file atomically, since another process may read it or end this one at any time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    written = file.with_name(f"{file.name}.{os.getpid()}")
    written.write_text(text)
    written.replace(file)
