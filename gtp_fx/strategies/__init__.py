"""How tokens are chosen and what becomes of them: `protocol` says what a strategy is, each other file is one."""

from gtp_fx.strategies.gtp import GTP
from gtp_fx.strategies.protocol import Strategy
from gtp_fx.strategies.registry import STRATEGIES, strategy_named

__all__ = ["GTP", "STRATEGIES", "Strategy", "strategy_named"]
