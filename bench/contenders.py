"""The strategies and schedules that `bench.accuracy` compares. Each strategy is as published, without fine-tuning.

Where a publication scores tokens by the CLS token's attention and a net has none, all tokens' attention replaces it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import gtp_fx
from gtp_fx.strategies import Strategy

Made = Callable[[str], Strategy]
"""Makes a strategy from the name of the score that a net supports."""

CONTENDERS: Mapping[str, Made] = {
    "regeneration": lambda _: gtp_fx.strategies.Regeneration(),
    "gtp": lambda _: gtp_fx.GTP(),
    "tome": lambda _: gtp_fx.ToMe(),
    "topk": lambda score: gtp_fx.TopK(score=score),
    "ppt": lambda score: gtp_fx.strategies.PPT(score=score),
    "mergence": lambda score: gtp_fx.strategies.Mergence(score=score),
    "cluster": lambda _: gtp_fx.strategies.Cluster(),
    "idle": lambda score: gtp_fx.strategies.Idle(score=score),
    "halting": lambda _: gtp_fx.strategies.Halting(),
    "saliency": lambda _: gtp_fx.strategies.Saliency(),
    "semantic": lambda _: gtp_fx.strategies.Semantic(),
    "random": lambda _: gtp_fx.strategies.Random(),
}
ASKED_FOR: Mapping[str, Made] = {"tokens skip": lambda _: gtp_fx.strategies.Regeneration(windows="skip")}
"""Contenders that differ from another one in some nets alone, so that they have to be asked for."""
_EVERY = {**CONTENDERS, **ASKED_FOR}
SCHEDULES = ("auto", "even")
"""gtp_fx's own choice, and the publications' constant count per block, spread exactly to the token."""
CHOSEN, CALIBRATED = "auto", "calibrated"
"""strategy="auto", which chooses strategy and schedule together on calibration images, and what its schedule is called.

It is no rival of the others but chosen among them, and takes a minute or more for each budget, so that it has to be
asked for."""


def contenders(strategies: Iterable[str]) -> list[Contender]:
    """Return each strategy on every schedule, or on one where it has a single site, so that schedules can't differ."""
    found = []
    for strategy in strategies:
        if strategy == CHOSEN:
            found.append(Contender(CHOSEN, CALIBRATED))
            continue
        single = len(list(_EVERY[strategy]("cls-mean").positions(_DEEP))) == 1
        found += [Contender(strategy, schedule) for schedule in (SCHEDULES[:1] if single else SCHEDULES)]
    return found


_DEEP = 12
"""Blocks of a typical stream."""


@dataclass(frozen=True)
class Contender:
    """A strategy on a schedule, which is one curve.

    strategy: a name in `CONTENDERS` or `ASKED_FOR`, or `CHOSEN`.
    schedule: a name in `SCHEDULES`; `CALIBRATED` with `CHOSEN`, and with nothing else.

    Raises ValueError for other names.
    """

    strategy: str
    schedule: str

    def __post_init__(self) -> None:
        known = self.strategy in _EVERY and self.schedule in SCHEDULES
        if not known and (self.strategy, self.schedule) != (CHOSEN, CALIBRATED):
            raise ValueError(f"{self}: strategies are {', '.join(_EVERY)}, schedules {' and '.join(SCHEDULES)}")

    def __str__(self) -> str:
        return f"{self.strategy}, {self.schedule}"

    def made(self, class_token: bool) -> Strategy | gtp_fx.strategies.Auto:
        """Return the strategy for a net with or without a CLS token."""
        if self.strategy == CHOSEN:
            return gtp_fx.strategies.Auto()
        return _EVERY[self.strategy]("cls-mean" if class_token else "broadcast-mean")
