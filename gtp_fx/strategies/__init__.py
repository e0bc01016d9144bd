"""How tokens are chosen and what becomes of them: `protocol` says what a strategy is, each other file is one.

    gtp         tokens that leave are propagated to their neighbours             arXiv 2311.03035
    tome        every second token may join the one it is most like              arXiv 2210.09461
    topk        what CLS attends to stays, the rest becomes one token            arXiv 2202.07800
    ppt         tokens are pruned or pooled, image by image                       arXiv 2310.01812
    mergence    what isn't crucial joins the crucial token most like it          arXiv 2306.04897
    cluster     once, around peaks of density                                    arXiv 2311.01197
    idle        tokens that aren't chosen sit blocks out, and may come back      arXiv 2310.05654
    halting     by a halting score that adds up over blocks                      arXiv 2112.07658
    saliency    a map of the image decides before the first block                arXiv 2305.09924
    random      by chance

All but `gtp` are a function from tokens to groups (`grouping`, `tokens`); a user's own are registered in the same way.
"""

from gtp_fx.strategies.cluster import Cluster
from gtp_fx.strategies.grouping import Grouping
from gtp_fx.strategies.gtp import GTP
from gtp_fx.strategies.halting import Halting
from gtp_fx.strategies.idle import Idle
from gtp_fx.strategies.mergence import Mergence
from gtp_fx.strategies.ppt import PPT
from gtp_fx.strategies.protocol import Strategy
from gtp_fx.strategies.random import Random
from gtp_fx.strategies.registry import STRATEGIES, register_strategy, strategy_named
from gtp_fx.strategies.saliency import Saliency, register_saliency
from gtp_fx.strategies.tokens import Groups, Tokens, averaged, dropped
from gtp_fx.strategies.tome import ToMe
from gtp_fx.strategies.topk import TopK

__all__ = [
    "GTP",
    "PPT",
    "STRATEGIES",
    "Cluster",
    "Grouping",
    "Groups",
    "Halting",
    "Idle",
    "Mergence",
    "Random",
    "Saliency",
    "Strategy",
    "ToMe",
    "Tokens",
    "TopK",
    "averaged",
    "dropped",
    "register_saliency",
    "register_strategy",
    "strategy_named",
]
