"""Blocks whose tokens a strategy can't work on keep them and are named, while the others serve the budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gtp_fx
from bench.counted import flops

from support.captured import optimised, shared_model
from support.printed import in_one_line
from support.zoo import in_tiers


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class TwoStages(nn.Module):
    """Two stages: three blocks over 8 x 8 patches, the first with CLS or without, then two over fewer patches.

    channels: of each stage. down: the factor between the two grids' sides. hidden: returns what is between the last two
    blocks, too.
    """

    def __init__(
        self, channels: tuple[int, int] = (32, 32), down: int = 4, class_token: bool = False, hidden: bool = False
    ) -> None:
        super().__init__()
        first, second = channels
        self.patches = nn.Conv2d(3, first, 8, 8)
        self.class_token = nn.Parameter(torch.randn(1, 1, first)) if class_token else None
        self.early = nn.ModuleList(Block(first) for _ in range(3))
        self.down = nn.Conv2d(first, second, down, down)
        self.late = nn.ModuleList(Block(second) for _ in range(2))
        self.head, self.hidden = nn.Linear(second, 10), hidden

    def forward(self, images: Tensor) -> Any:
        x = self.patches(images).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.early:
            x = block(x)
        if self.class_token is not None:
            x = x[:, 1:]
        x = self.down(x.transpose(1, 2).unflatten(2, (8, 8))).flatten(2).transpose(1, 2)
        between = self.late[0](x)
        scores = self.head(self.late[1](between).mean(dim=1))
        return (scores, between) if self.hidden else scores


@dataclass(frozen=True)
class Source:
    """What builds one of them."""

    channels: tuple[int, int] = (32, 32)
    down: int = 4
    class_token: bool = False
    hidden: bool = False

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return TwoStages(self.channels, self.down, self.class_token, self.hidden).eval()

    def inputs(self) -> Tensor:
        return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Case:
    """A model, a strategy that can't work on its second stage, and what the report says of that."""

    source: Source
    strategy: Any
    reason: str
    schedule: str = "auto"


PLAIN = Source()
CASES = {
    "fewer patches than neighbours": Case(PLAIN, "gtp", "neighbors=8 needs more than 8 patch tokens, and there are 4"),
    "fewer than neighbours, uniform": Case(PLAIN, "gtp", "neighbors=8 needs more than 8", schedule="uniform"),
    "no CLS": Case(Source(class_token=True), "topk", "there is no prefix token here"),
    "no such feature": Case(
        Source(channels=(48, 32)), gtp_fx.strategies.Halting(feature=40), "tokens here have 32 features"
    ),
    "hidden states": Case(
        Source(hidden=True, down=2),
        gtp_fx.strategies.Idle(score="broadcast-mean"),
        "of which strategy 'idle' has only a part",
    ),
}
SLOW = ("fewer than neighbours, uniform", "no CLS", "no such feature")
LATE = (3, 4)
"""The second stage's blocks."""


@torch.no_grad()
def counted(model: nn.Module, source: Source) -> int:
    """What torch counts."""
    return flops(model, (source.inputs(),))


@pytest.mark.parametrize("name", in_tiers(CASES, *SLOW))
def test_the_other_blocks_serve_the_budget(name: str) -> None:
    case = CASES[name]
    fast = optimised(case.source, strategy=case.strategy, flops_budget=0.8, schedule=case.schedule)
    before, after = (counted(model, case.source) for model in (shared_model(case.source), fast.graph_module))
    assert 0.75 < after / before <= 0.8
    assert not any(fast.schedule.removed[block] for block in LATE) and any(fast.schedule.removed)
    (named,) = {refusal.reason for refusal in fast.report.refusals}
    assert case.reason in named and case.reason in in_one_line(str(fast.report))


@pytest.mark.parametrize("name", in_tiers(CASES, *SLOW))
def test_who_asks_for_such_a_block_is_told(name: str) -> None:
    case = CASES[name]
    with pytest.raises(gtp_fx.ScheduleError, match=f"block 3 can't remove 1 tokens: .*{case.reason}"):
        optimised(case.source, strategy=case.strategy, schedule=[9, 0, 0, 1, 0])


def test_who_asks_for_others_is_served() -> None:
    assert tuple(optimised(PLAIN, schedule=[9, 0, 0, 0, 0]).schedule.removed) == (9, 0, 0, 0, 0)


def test_a_budget_out_of_reach_names_both_reasons() -> None:
    with pytest.raises(gtp_fx.BudgetError, match=r"lowest ratio .*(?s:.*)late\.0.*: neighbors=8 .*(?s:.*)late\.1"):
        optimised(PLAIN, strategy="gtp", flops_budget=0.1)


def test_where_no_block_is_left_the_model_is_refused() -> None:
    with pytest.raises(gtp_fx.UnsupportedModelError, match=r"can't work on this model(?s:.*)early\.0(?s:.*)late\.1"):
        optimised(PLAIN, flops_budget=0.8, strategy=gtp_fx.GTP(neighbors=64))


def test_a_small_stage_does_not_bound_the_uniform_count() -> None:
    """Four patches over two blocks would allow one a block; that stage removes what it can, and the other goes on."""
    fast = optimised(PLAIN, flops_budget=0.7, schedule="uniform", strategy=gtp_fx.GTP(graph="spatial"))
    first, *others = fast.schedule.removed
    assert first > 3 and others == [first, first, 3, 0]
