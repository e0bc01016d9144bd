"""Strategies by name: this package's and a user's own."""

from __future__ import annotations

from typing import TypeVar

from gtp_fx.errors import OptionError
from gtp_fx.strategies.group_operator import define_operator
from gtp_fx.strategies.grouping import Grouping
from gtp_fx.strategies.gtp import GTP
from gtp_fx.strategies.protocol import Strategy

STRATEGIES: dict[str, type] = {GTP.name: GTP}
"""Each name's class, whose defaults `strategy="name"` means."""

C = TypeVar("C", bound=type[Grouping])


def register_strategy(cls: C) -> C:
    """Make `strategy="<cls.name>"` and values of `cls` work everywhere. A decorator over a frozen dataclass.

    Raises OptionError where the class can't be one. A class of the same name takes the place of the one before, as
    notebooks want it, but for this package's own.
    """
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise OptionError(f"{cls.__name__}.name={name!r}: give a class variable such as name: ClassVar[str] = 'mine'")
    if "__dataclass_fields__" not in vars(cls) or not issubclass(cls, Grouping):  # inherited, they would lack its own
        raise OptionError(
            f"{cls.__name__} is no dataclass over gtp_fx.Grouping: write @dataclass(frozen=True) above it"
        )
    before = STRATEGIES.get(name)
    if before is not None and before.__module__.startswith(__package__) and before is not cls:
        raise OptionError(f"{cls.__name__}.name={name!r} is one of gtp_fx's own: {', '.join(STRATEGIES)}; give another")
    STRATEGIES[name] = cls
    define_operator(name, STRATEGIES)
    return cls


def strategy_named(strategy: str | Strategy) -> Strategy:
    """A strategy from its name, or the value itself."""
    if isinstance(strategy, str):
        if strategy not in STRATEGIES:
            known = ", ".join(map(repr, STRATEGIES))
            raise OptionError(
                f"strategy={strategy!r} is unknown; give one of {known}, or a value such as gtp_fx.GTP(alpha=0.2)"
            )
        return STRATEGIES[strategy]()  # type: ignore[no-any-return]
    if isinstance(strategy, type) or not hasattr(strategy, "site_works"):
        raise OptionError(f"strategy={strategy!r} is neither a name nor a strategy value such as gtp_fx.GTP(alpha=0.2)")
    if isinstance(strategy, Grouping) and STRATEGIES.get(strategy.name) is not type(strategy):
        raise OptionError(f"strategy={strategy!r} isn't registered: put @gtp_fx.register_strategy over its class")
    return strategy
