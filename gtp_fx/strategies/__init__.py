"""Strategies: which tokens a site removes, and what becomes of them.

`protocol` defines what a strategy is. Each of these files is one:

    regeneration  tokens that others can stand for merge into the most similar one
    gtp           removed tokens are propagated to their neighbours               arXiv 2311.03035
    tome          every second token may merge into the one most similar to it    arXiv 2210.09461
    topk          tokens that CLS attends to are kept, the rest fused into one    arXiv 2202.07800
    ppt           tokens are pruned or pooled, decided for each image             arXiv 2310.01812
    mergence      other tokens merge into the most similar crucial token          arXiv 2306.04897
    cluster       tokens are clustered once, around density peaks                 arXiv 2311.01197
    idle          tokens that aren't chosen skip blocks, and may come back        arXiv 2310.05654
    halting       tokens with the largest accumulated halting score are removed   arXiv 2112.07658
    saliency      a saliency map of the image decides before the first block      arXiv 2305.09924
    semantic      patches of a cell become one token, which attends to all        arXiv 2303.08685
    random        tokens are removed at random

`auto` is a choice among them.

All but `gtp` are one function from tokens to groups (`grouping`, `tokens`). A user's own strategies are registered in
the same way.
"""

from gtp_fx.strategies.auto import Auto
from gtp_fx.strategies.cluster import Cluster
from gtp_fx.strategies.grouping import Grouping
from gtp_fx.strategies.gtp import GTP
from gtp_fx.strategies.halting import Halting
from gtp_fx.strategies.idle import Idle
from gtp_fx.strategies.mergence import Mergence
from gtp_fx.strategies.ppt import PPT
from gtp_fx.strategies.protocol import Strategy
from gtp_fx.strategies.random import Random
from gtp_fx.strategies.regeneration import Regeneration
from gtp_fx.strategies.registry import STRATEGIES, register_strategy, strategy_named
from gtp_fx.strategies.saliency import Saliency, register_saliency
from gtp_fx.strategies.semantic import Semantic
from gtp_fx.strategies.tokens import Groups, Tokens, averaged, dropped
from gtp_fx.strategies.tome import ToMe
from gtp_fx.strategies.topk import TopK

__all__ = [
    "GTP",
    "PPT",
    "STRATEGIES",
    "Auto",
    "Cluster",
    "Grouping",
    "Groups",
    "Halting",
    "Idle",
    "Mergence",
    "Random",
    "Regeneration",
    "Saliency",
    "Semantic",
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
