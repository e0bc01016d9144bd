"""Results for each image so far, in files that a run can be resumed from: none is evaluated, or counted, twice.

The first line of a file identifies its run; a run with other settings is refused. Under torchrun each process appends
to a file of its own, FILE.rankR. All of them are read when a run begins, so it may continue with another number of
processes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path


class StateError(ValueError):
    """A state file of another run, or none at all."""


@dataclass(frozen=True)
class Found:
    """One image, `place` in its set: whether the original's and the optimised model's best class is the label, whether
    their best five hold it, and whether both predict the same class."""

    place: int
    original_1: bool
    original_5: bool
    optimised_1: bool
    optimised_5: bool
    same: bool


@dataclass
class Record:
    """file: this process's own; None to keep nothing. run: what decides the result, by name. found: by place."""

    file: Path | None
    run: Mapping[str, object]
    found: dict[int, Found]

    @classmethod
    def of(cls, state: Path | None, run: Mapping[str, object], rank: int = 0) -> Record:
        """With what earlier runs have left. Raises StateError where one of its files is another run's."""
        found: dict[int, Found] = {}
        if state is None:
            return cls(None, run, found)
        state.parent.mkdir(parents=True, exist_ok=True)
        own = state.with_name(f"{state.name}.rank{rank}")
        for file in sorted(state.parent.glob(f"{state.name}.rank*")):
            found |= _read(file, run)
        if not own.exists():
            own.write_text(json.dumps(run) + "\n")
        return cls(own, run, found)

    def add(self, batch: Iterable[Found]) -> None:
        """Remember a batch, on disk before anything else is done."""
        rows = list(batch)
        self.found |= {row.place: row for row in rows}
        if self.file is not None:
            with self.file.open("a") as file:
                file.write(json.dumps([[int(value) for value in astuple(row)] for row in rows]) + "\n")


def _read(file: Path, run: Mapping[str, object]) -> dict[int, Found]:
    head, *lines = file.read_text().splitlines() or [""]
    try:
        before = json.loads(head)
    except ValueError:
        before = None
    if not isinstance(before, dict):
        raise StateError(f"{file} is no state of this bench: give --state another name")
    if other := [name for name in {*run, *before} if before.get(name) != run.get(name)]:
        name = sorted(other)[0]
        raise StateError(
            f"{file} is of a run with {name}={before.get(name)!r}, and this one has {name}={run.get(name)!r}: "
            f"give --state another name, or the settings of that run"
        )
    found = {}
    for line in lines:
        try:
            rows = json.loads(line)
        except ValueError:
            continue  # the last line of a run that was cut off while it wrote
        for place, *flags in rows:
            found[int(place)] = Found(int(place), *map(bool, flags))
    return found
