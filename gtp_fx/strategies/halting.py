"""A-ViT (arXiv 2112.07658): tokens whose halting scores have added up to most leave. Counts are the schedule's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from gtp_fx.errors import OptionError
from gtp_fx.strategies.grouping import Grouping
from gtp_fx.strategies.registry import register_strategy
from gtp_fx.strategies.tokens import Groups, Tokens, dropped


@register_strategy
@dataclass(frozen=True)
class Halting(Grouping):
    """A token's halting score is sigmoid(gamma * t_e + beta) of one of its features, added up from site to site (section 3.1).

    gamma, beta: what a network was trained with, and it alone knows. feature: e, the first one in the publication. A network that was trained to halt
    halts a token when its sum reaches 1, at another place in each image; here those of the largest sums leave, as many as the
    schedule says (calibration= finds how many), and nothing of them stays. Any other network says nothing by that feature:
    this is then a choice by chance that is the same in every run.
    """

    name: ClassVar[str] = "halting"
    carries: ClassVar[bool] = True
    gamma: float = 5.0
    beta: float = -10.0
    feature: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.gamma) and math.isfinite(self.beta)):
            raise OptionError(f"{self}: gamma and beta are finite numbers")
        if isinstance(self.feature, bool) or not isinstance(self.feature, int) or self.feature < 0:
            raise OptionError(f"Halting(feature={self.feature!r}): give the number of a channel, from 0")

    def group(self, tokens: Tokens) -> Groups:
        channels = tokens.x_BNC.shape[-1]
        if self.feature >= channels:
            raise OptionError(f"Halting(feature={self.feature}): tokens here have {channels} features, from 0")
        feature_Bn = tokens.patches_BnC[..., self.feature].float()
        sum_Bn = torch.sigmoid(self.gamma * feature_Bn + self.beta)
        if tokens.carried_Bn is not None:
            sum_Bn = sum_Bn + tokens.carried_Bn
        return dropped(-sum_Bn, tokens.leaving, carried_Bn=sum_Bn)
