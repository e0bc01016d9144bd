"""The schedule: how many tokens each attention block propagates. A value, with a JSON form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from gtp_fx.errors import ScheduleError

_VERSION = 1


@dataclass(frozen=True)
class Schedule:
    """`propagated[i]` patch tokens leave at attention block i, in graph order.

    tokens: patch tokens that enter block i's stream at first, one entry a block; what a schedule of another model or
    another image size is recognised by.
    """

    propagated: tuple[int, ...]
    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.propagated) != len(self.tokens):
            raise ScheduleError(f"{len(self.propagated)} counts for {len(self.tokens)} attention blocks")
        if any(isinstance(p, bool) or not isinstance(p, int) or p < 0 for p in self.propagated):
            raise ScheduleError(
                f"a schedule counts tokens: every entry is an integer of 0 or more, got {list(self.propagated)}"
            )

    def __iter__(self) -> Iterator[int]:
        return iter(self.propagated)

    def __len__(self) -> int:
        return len(self.propagated)

    @property
    def removes_nothing(self) -> bool:
        return not any(self.propagated)

    def to_json(self) -> str:
        return json.dumps({"version": _VERSION, "propagated": self.propagated, "tokens": self.tokens})

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        try:
            data = json.loads(text)
            if data["version"] != _VERSION:
                raise ScheduleError(f"a schedule of version {data['version']}; this gtp_fx reads {_VERSION}")
            return cls(tuple(data["propagated"]), tuple(data["tokens"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ScheduleError(f"not a schedule's JSON: {error!r}; Schedule.to_json() writes one") from error
