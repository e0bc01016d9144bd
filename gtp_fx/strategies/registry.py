"""Strategies by name."""

from __future__ import annotations

from gtp_fx.errors import OptionError
from gtp_fx.strategies.gtp import GTP
from gtp_fx.strategies.protocol import Strategy

STRATEGIES: dict[str, type] = {GTP.name: GTP}
"""Each name's class, whose defaults `strategy="name"` means."""


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
    return strategy
