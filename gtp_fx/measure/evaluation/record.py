"""What was found so far on each image of a set, in files, so that no image is evaluated twice.

The first line of a file identifies its run; a run with other settings is refused. Under torchrun each process appends
to a file of its own, FILE.rankR. All of them are read when a run begins, so it may continue with another number of
processes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

from gtp_fx.errors import OptionError
from gtp_fx.measure.evaluation.found import Found


@dataclass
class Record:
    """What was found by place.

    file: this process's own; None to keep nothing.
    run: what decides the result, by name.
    found: what was found so far, by the image's place.
    """

    file: Path | None
    run: Mapping[str, object]
    found: dict[int, Found]

    @classmethod
    def of(cls, state: Path | None, run: Mapping[str, object], rank: int = 0) -> Record:
        """Return a record with what earlier runs have left.

        Raises OptionError where one of its files is another run's.
        """
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
                file.write(json.dumps([list(map(_number, astuple(row))) for row in rows]) + "\n")


def must_be_of(before: object, run: Mapping[str, object], where: str) -> None:
    """Check that what was found before is of this run. Raises OptionError that names what differs.

    where: which file it is in, and the option that gives it another name: "FILE: give --state another name".
    """
    file, _, advice = where.partition(": ")
    if not isinstance(before, dict):
        raise OptionError(f"{file} holds no record of an evaluation: {advice}")
    if other := [name for name in {*run, *before} if before.get(name) != run.get(name)]:
        name = sorted(other)[0]
        raise OptionError(
            f"{file} is of a run with {name}={before.get(name)!r}, and this one has {name}={run.get(name)!r}: "
            f"{advice}, or the settings of that run"
        )


def _number(value: float) -> float | int:
    """Return a flag as a number."""
    return int(value) if isinstance(value, bool) else value


def _read(file: Path, run: Mapping[str, object]) -> dict[int, Found]:
    head, *lines = file.read_text().splitlines() or [""]
    try:
        before = json.loads(head)
    except ValueError:
        before = None
    must_be_of(before, run, f"{file}: give it another name")
    found = {}
    for line in lines:
        try:
            rows = json.loads(line)
        except ValueError:
            continue  # the last line of a run that was cut off while it wrote
        for place, one, five, now_one, now_five, same, divergence, cosine in rows:
            right = bool(one), bool(five), bool(now_one), bool(now_five)
            found[place] = Found(place, *right, bool(same), divergence, cosine)
    return found
