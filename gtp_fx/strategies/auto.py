"""strategy="auto": the strategy that moves outputs least on calibration images, or the default where there are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from gtp_fx.errors import OptionError
from gtp_fx.strategies.protocol import Strategy
from gtp_fx.strategies.regeneration import Regeneration
from gtp_fx.strategies.registry import AUTO, STRATEGIES, strategy_named


@dataclass(frozen=True)
class Auto:
    """A choice among strategies, their variants and schedules, made on calibration images (`gtp_fx.plan.contest`).

    among: the strategies to choose from, each a name or a value; none means all that are registered. Their variants
        take part, too.

    Raises OptionError for what is no strategy. Strategies that read whole attention maps, and those that shorten
    queries alone, can only be compared with their own kind, since the exact passes make other graphs for them.
    """

    among: Sequence[Any] = ()

    name: ClassVar[str] = AUTO

    def __post_init__(self) -> None:
        given = self.among
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise OptionError(f"Auto(among={given!r}): give a list of strategies, by name or value")
        if any(isinstance(each, Auto) or each == AUTO for each in given):
            raise OptionError(f"Auto(among={list(given)!r}): 'auto' is the choice itself, and none of what it is among")
        among = tuple(map(strategy_named, given))
        object.__setattr__(self, "among", among)
        for differ, kind in (
            (_full_maps, "read whole attention maps (attention_sparsity below 1)"),
            (_queries_alone, "shorten queries alone ('semantic')"),
        ):
            if len(set(map(differ, among))) > 1:
                raise OptionError(
                    f"Auto(among={list(given)!r}): some of these {kind}, and some don't: compare them one kind at a "
                    f"time, by report.moved"
                )

    @property
    def first(self) -> Strategy:
        """Return the strategy where there is nothing to choose by: the first of `among`, or the default."""
        return self.among[0] if self.among else Regeneration()

    def contenders(self) -> list[Strategy]:
        """Return all strategies to choose from, each followed by its variants, none of them twice.

        A registered class without defaults for its fields takes no part; `among` can have a value of it.
        """
        bases: list[Strategy] = [self.first, *self.among]
        if not self.among:
            for name in STRATEGIES:
                try:
                    bases.append(strategy_named(name))
                except OptionError:
                    continue
        every = [each for base in bases for each in (base, *base.variants())]
        return [
            each
            for each in dict.fromkeys(every)
            if _full_maps(each) == _full_maps(self.first) and _queries_alone(each) == _queries_alone(self.first)
        ]


def _full_maps(strategy: Strategy) -> bool:
    return strategy.needs_full_maps


def _queries_alone(strategy: Strategy) -> bool:
    return strategy.shortens_queries


def chosen_by(given: Any, strategy: Strategy) -> str:
    """Return the name of the strategy that "auto" chose or stood for; "" where another was given."""
    return strategy.name if given == AUTO or isinstance(given, Auto) else ""
