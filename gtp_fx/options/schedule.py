"""Schedule: how many tokens are removed at each attention block. A value with a JSON form."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gtp_fx.errors import OptionError, ScheduleError

AUTO = "auto"
SCHEDULES = (AUTO, "even", "uniform")
"""Names of schedules: "auto" is the one of least expected damage, the others are rules in `gtp_fx.plan.uniform`."""

_VERSION = 4
_COUNTS = {2: "propagated", 3: "removed", 4: "removed"}
"""What the counts are called in a schedule's JSON, by its version; since 4 it says the strategy, too."""


@dataclass(frozen=True)
class BlockShape:
    """Sizes of one attention block, by which a schedule recognises the model it was made for.

    tokens: patch tokens of its residual stream before any are removed; those of one window, where it attends within
        windows.
    channels: channels of its residual stream, or 0 where it has none.
    head: features per head.
    """

    tokens: int
    channels: int
    head: int

    def __str__(self) -> str:
        return f"{self.tokens} patch tokens, {self.channels} channels, heads of {self.head}"


@dataclass(frozen=True)
class Schedule:
    """Number of patch tokens removed at each attention block, for a model with the given blocks.

    removed: patch tokens removed at each attention block, in graph order. Where the block attends within windows,
        the tokens of each window that skip its MLP.
    blocks: shapes of those blocks. A schedule only fits a model that has the same.
    strategy: the strategy that it was planned for, as `strategy=` takes it, "gtp(alpha=0.2)", under which alone the
        counts keep the budget that they were found for; "" where that isn't known, or nothing is removed.

    Raises ScheduleError where the lengths differ, or a count is no integer of 0 or more.
    """

    removed: tuple[int, ...]
    blocks: tuple[BlockShape, ...]
    strategy: str = ""

    def __post_init__(self) -> None:
        if len(self.removed) != len(self.blocks):
            raise ScheduleError(f"{len(self.removed)} counts for {len(self.blocks)} attention blocks")
        if not all(map(_is_count, self.removed)):
            raise ScheduleError(
                f"a schedule counts tokens: every entry is an integer of 0 or more, got {list(self.removed)}"
            )

    def __iter__(self) -> Iterator[int]:
        return iter(self.removed)

    def __len__(self) -> int:
        return len(self.removed)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Return the patch tokens of each block's residual stream before any are removed."""
        return tuple(block.tokens for block in self.blocks)

    @property
    def removes_nothing(self) -> bool:
        return not any(self.removed)

    def must_fit(self, blocks: Sequence[BlockShape]) -> None:
        """Check that the schedule was made for a model with `blocks`.

        Raises ScheduleError, which names the first block that differs.
        """
        if len(blocks) != len(self.blocks):
            raise ScheduleError(
                f"this schedule was made for another model: it has {len(self.blocks)} attention blocks, this one "
                f"{len(blocks)}"
            )
        for number, (own, found) in enumerate(zip(self.blocks, blocks, strict=True)):
            if own != found:
                raise ScheduleError(
                    f"this schedule was made for another model or image size: its block {number} has {own}; this "
                    f"model's has {found}. Make one for this model, or give only the counts, "
                    f"schedule={_brief(self.removed)}"
                )

    def must_be_for(self, strategies: Sequence[str]) -> None:
        """Check that the schedule was planned for a strategy. strategies: what it may be called, the user's word first.

        Raises ScheduleError where it was planned for another.
        """
        if self.strategy and self.strategy not in strategies:
            raise ScheduleError(
                f"this schedule was planned for strategy {self.strategy!r}, and the strategy here is "
                f"{strategies[0]!r}, under which the same counts cost and lose something else: give "
                f"strategy={self.strategy!r}, or only the counts, schedule={_brief(self.removed)}"
            )

    def to_json(self) -> str:
        blocks = [asdict(block) for block in self.blocks]
        return json.dumps({"version": _VERSION, "strategy": self.strategy, "removed": self.removed, "blocks": blocks})

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Return the schedule that `to_json` wrote; only numbers and text are read.

        Raises ScheduleError for any other text.
        """
        try:
            data: Any = json.loads(text)
            if data["version"] not in _COUNTS:
                known = ", ".join(map(str, _COUNTS))
                raise ScheduleError(f"a schedule of version {data['version']}; this gtp_fx reads versions {known}")
            blocks = tuple(BlockShape(**block) for block in data["blocks"])
            if not all(_is_count(size) for block in blocks for size in asdict(block).values()):
                raise ScheduleError("a schedule's blocks are described by integers")
            strategy = data["strategy"] if data["version"] >= 4 else ""
            if not isinstance(strategy, str):
                raise ScheduleError(f"a schedule's strategy is text, got {strategy!r}")
            return cls(tuple(data[_COUNTS[data["version"]]]), blocks, strategy)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ScheduleError(f"not a schedule's JSON: {error!r}; Schedule.to_json() writes one") from error

    @classmethod
    def from_file(cls, file: str | Path) -> Schedule:
        """Return the schedule in a file that holds its JSON.

        Raises OptionError where the file can't be read, and ScheduleError where it holds no schedule.
        """
        try:
            text = Path(file).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(
                f"schedule={str(file)!r} can't be read: {getattr(error, 'strerror', None) or error}; give a file that "
                f"`gtp-fx plan --save-schedule` wrote, or Schedule.to_json()"
            ) from error
        try:
            return cls.from_json(text)
        except ScheduleError as error:
            raise ScheduleError(f"{file}: {error}") from error


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _brief(counts: Sequence[int]) -> str:
    return str(list(counts)) if len(counts) <= 12 else f"[{', '.join(map(str, counts[:8]))}, …]"
