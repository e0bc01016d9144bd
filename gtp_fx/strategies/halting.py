"""A-ViT (arXiv 2112.07658): remove the tokens with the largest accumulated halting score."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from gtp_fx.errors import OptionError
from gtp_fx.strategies.grouping import Grouping
from gtp_fx.strategies.registry import register_strategy
from gtp_fx.strategies.tokens import Groups, Tokens, dropped
from gtp_fx.types.axes import TokenAxis


@register_strategy
@dataclass(frozen=True)
class Halting(Grouping):
    """Adaptive halting: a token's score sigmoid(gamma * t_e + beta) adds up from site to site (section 3.1).

    t_e is one of the token's features. A network that was trained to halt stops a token when its sum reaches 1, so that
    the number of tokens differs from image to image. Here the tokens of largest sum are removed, as many as the
    schedule says (calibration= finds how many), and nothing of them is kept. In any other network the feature means
    nothing, so the choice is arbitrary, though the same in every run.

    gamma, beta: the constants that the network was trained with.
    feature: e, a channel; the first one in the publication.
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

    def refuse_stream(self, stream: fx.Node, axis: TokenAxis) -> str:
        channels = stream.meta["val"].shape[-1]
        if self.feature < channels:
            return ""
        return f"Halting(feature={self.feature}): tokens here have {channels} features, from 0"

    def group(self, tokens: Tokens) -> Groups:
        feature_Bn = tokens.patches_BnC[..., self.feature].float()
        sum_Bn = torch.sigmoid(self.gamma * feature_Bn + self.beta)
        if tokens.carried_Bn is not None:
            sum_Bn = sum_Bn + tokens.carried_Bn
        return dropped(-sum_Bn, tokens.removed, carried_Bn=sum_Bn)
