"""The strategies that `bench.accuracy` compares, each as its publication has it off the shelf, and the schedules that they run on.

Where a net has no CLS token, what a publication reads off it is read off all tokens' attention instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import gtp_fx
from gtp_fx.strategies import Strategy

Made = Callable[[str], Strategy]
"""From the score that a net can give."""

CONTENDERS: Mapping[str, Made] = {
    "gtp": lambda _: gtp_fx.GTP(),
    "tome": lambda _: gtp_fx.ToMe(),
    "topk": lambda score: gtp_fx.TopK(score=score),
    "ppt": lambda score: gtp_fx.strategies.PPT(score=score),
    "mergence": lambda score: gtp_fx.strategies.Mergence(score=score),
    "cluster": lambda _: gtp_fx.strategies.Cluster(),
    "idle": lambda score: gtp_fx.strategies.Idle(score=score),
    "halting": lambda _: gtp_fx.strategies.Halting(),
    "saliency": lambda _: gtp_fx.strategies.Saliency(),
    "random": lambda _: gtp_fx.strategies.Random(),
}
SCHEDULES = ("auto", "even")
"""gtp_fx's own choice, and the publications' constant count a block, to the token."""


def contenders(strategies: Iterable[str]) -> list[Contender]:
    """Each strategy on every schedule; on one where it has one site alone, which leaves a schedule nothing to choose."""
    found = []
    for strategy in strategies:
        single = len(list(CONTENDERS[strategy]("cls-mean").positions(_DEEP))) == 1
        found += [Contender(strategy, schedule) for schedule in (SCHEDULES[:1] if single else SCHEDULES)]
    return found


_DEEP = 12
"""Blocks of a stream, as any."""


@dataclass(frozen=True)
class Contender:
    """A strategy on a schedule: what one curve is of."""

    strategy: str
    schedule: str

    def __post_init__(self) -> None:
        if self.strategy not in CONTENDERS or self.schedule not in SCHEDULES:
            raise ValueError(f"{self}: strategies are {', '.join(CONTENDERS)}, schedules {' and '.join(SCHEDULES)}")

    def __str__(self) -> str:
        return f"{self.strategy}, {self.schedule}"

    def made(self, class_token: bool) -> Strategy:
        return CONTENDERS[self.strategy]("cls-mean" if class_token else "broadcast-mean")
