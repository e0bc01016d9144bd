"""Random choice: the baseline that any other strategy has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gtp_fx.errors import OptionError
from gtp_fx.strategies.grouping import Grouping
from gtp_fx.strategies.registry import register_strategy
from gtp_fx.strategies.tokens import Groups, Tokens, dropped

_MIX, _FOLD, _MASK = 0x45D9F3B, 16, 0xFFFFFFFF
"""Constants of an integer hash: two rounds of multiply and fold, in the lower 32 bits of an int64.

A hash replaces random numbers, so that an image's result is the same compiled and eager, alone and in a batch.
"""


@register_strategy
@dataclass(frozen=True)
class Random(Grouping):
    """Removal at random, of which nothing is kept. Each block removes other places, the same ones in every image.

    seed: number of the choice.
    """

    name: ClassVar[str] = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise OptionError(f"Random(seed={self.seed!r}): give an integer")

    def group(self, tokens: Tokens) -> Groups:
        start = ((self.seed * 1_000_003 + tokens.block + 1) << 16) & _MASK
        return dropped(_hash(tokens.index_Bn + start).float(), tokens.removed)


def _hash(x: Tensor) -> Tensor:
    """Hash each integer to 24 bits, as many as a float32 can tell apart."""
    for _ in range(2):
        x = ((x ^ (x >> _FOLD)) * _MIX) & _MASK
    return torch.bitwise_right_shift(x ^ (x >> _FOLD), 8)
