"""The schedule: how many tokens each attention block propagates. A value, with a JSON form."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gtp_fx.errors import ScheduleError

AUTO = "auto"
SCHEDULES = (AUTO, "even", "uniform")
"""What a schedule may be called: of least damage, or by one of the rules of `gtp_fx.plan.uniform`."""

_VERSION = 2


@dataclass(frozen=True)
class BlockShape:
    """What a schedule's model is recognised by, for each attention block.

    tokens: patch tokens that enter its stream at first (of a window, where it attends within windows). channels: of its residual
    stream, 0 where it has none. head: features of a head.
    """

    tokens: int
    channels: int
    head: int

    def __str__(self) -> str:
        return f"{self.tokens} patch tokens, {self.channels} channels, heads of {self.head}"


@dataclass(frozen=True)
class Schedule:
    """`propagated[i]` patch tokens leave at attention block i, in graph order (where it attends within windows: that skip its
    MLP, in each window). blocks: the shapes of those blocks; a schedule is only good for a model that has the same.
    """

    propagated: tuple[int, ...]
    blocks: tuple[BlockShape, ...]

    def __post_init__(self) -> None:
        if len(self.propagated) != len(self.blocks):
            raise ScheduleError(f"{len(self.propagated)} counts for {len(self.blocks)} attention blocks")
        if not all(map(_is_count, self.propagated)):
            raise ScheduleError(
                f"a schedule counts tokens: every entry is an integer of 0 or more, got {list(self.propagated)}"
            )

    def __iter__(self) -> Iterator[int]:
        return iter(self.propagated)

    def __len__(self) -> int:
        return len(self.propagated)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Patch tokens that enter each block's stream at first."""
        return tuple(block.tokens for block in self.blocks)

    @property
    def removes_nothing(self) -> bool:
        return not any(self.propagated)

    def must_fit(self, blocks: Sequence[BlockShape]) -> None:
        """Raises ScheduleError, with the first block that differs, where `blocks` are another model's."""
        if len(blocks) != len(self.blocks):
            raise ScheduleError(
                f"this schedule was made for another model: it has {len(self.blocks)} attention blocks, this one {len(blocks)}"
            )
        for number, (own, found) in enumerate(zip(self.blocks, blocks, strict=True)):
            if own != found:
                raise ScheduleError(
                    f"this schedule was made for another model or image size: its block {number} has {own}; this model's has "
                    f"{found}. Make one for this model, or give the counts alone, schedule={_brief(self.propagated)}"
                )

    def to_json(self) -> str:
        blocks = [asdict(block) for block in self.blocks]
        return json.dumps({"version": _VERSION, "propagated": self.propagated, "blocks": blocks})

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Raises ScheduleError for anything that `to_json` doesn't write. Nothing but numbers is read from it."""
        try:
            data: Any = json.loads(text)
            if data["version"] != _VERSION:
                raise ScheduleError(f"a schedule of version {data['version']}; this gtp_fx reads {_VERSION}")
            blocks = tuple(BlockShape(**block) for block in data["blocks"])
            if not all(_is_count(size) for block in blocks for size in asdict(block).values()):
                raise ScheduleError("a schedule's blocks are described by integers")
            return cls(tuple(data["propagated"]), blocks)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ScheduleError(f"not a schedule's JSON: {error!r}; Schedule.to_json() writes one") from error


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _brief(counts: Sequence[int]) -> str:
    return str(list(counts)) if len(counts) <= 12 else f"[{', '.join(map(str, counts[:8]))}, …]"
