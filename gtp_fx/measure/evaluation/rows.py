"""The rows of an evaluation, and what they are rows about, as values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gtp_fx.measure.evaluation.found import Outputs, Sums
from gtp_fx.measure.evaluation.times import Times


@dataclass(frozen=True)
class About:
    """What an evaluation is of.

    model: the original's name.
    run: what decides the result, by name: versions, the weights' and images' digests, dtype, device, …
    data: what the images are, in words.
    images: how many they are.
    prepared: how pictures became inputs, in words; "" where they came as tensors.
    unlabelled: why there is no accuracy; "" where there is.
    outputs: whether scores of classes or features are compared.
    parameters: of each of the models, which share them.
    machine: what it ran on.
    """

    model: str
    run: Mapping[str, object]
    data: str
    images: int
    prepared: str
    unlabelled: str
    outputs: Outputs
    parameters: int
    machine: str


@dataclass(frozen=True)
class Row:
    """One optimised model: a strategy at a budget.

    name: its name in the tables.
    asked: the options that it was asked for with, as text.
    strategy: the strategy with its numbers.
    schedule: tokens removed at each attention block.
    flops_ratio: its FLOPs / the original's.
    sums: what was found on the images; None where it wasn't evaluated yet.
    times: time and memory; None where they weren't measured.
    reason: why there is no such model, or why its output is wrong; "" where there is nothing to say.
    chosen: the name of the strategy that "auto" chose or stood for; "" where the strategy was given.
    """

    name: str
    asked: Mapping[str, str]
    strategy: str = ""
    schedule: tuple[int, ...] = ()
    flops_ratio: float = math.nan
    sums: Sums | None = None
    times: Times | None = None
    reason: str = ""
    chosen: str = ""

    @property
    def label(self) -> str:
        """Its name in the tables, of "auto" with what that chose."""
        return f"{self.name}: {self.chosen}" if self.chosen else self.name

    def is_done(self, timed: bool) -> bool:
        """Return whether nothing is left to measure. timed: whether times are wanted."""
        return bool(self.reason) or (self.sums is not None and (self.times is not None or not timed))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        """Return what `dataclasses.asdict` has made a dict of."""
        sums, times, ratio = values["sums"], values["times"], values["flops_ratio"]
        return cls(
            **{
                **values,
                "schedule": tuple(values["schedule"]),
                "flops_ratio": math.nan if ratio is None else ratio,
                "sums": None if sums is None else Sums(**sums),
                "times": None if times is None else Times.from_dict(times),
            }
        )


def with_rows(rows: Iterable[Row], others: Sequence[Row]) -> tuple[Row, ...]:
    """Return some rows, with others in the place of those of the same name and the rest behind."""
    found = {row.name: row for row in rows}
    return tuple({**found, **{row.name: row for row in others}}.values())
