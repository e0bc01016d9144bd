"""strategy="auto": the least divergence wins, what can't take part is named, and nothing is judged twice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import gtp_fx
from gtp_fx.model import pipeline
from gtp_fx.model.pipeline import Optimised
from gtp_fx.options.calibration import Calibration
from gtp_fx.options.options import Options
from gtp_fx.plan import contest
from gtp_fx.plan.damage.divergence import divergence
from gtp_fx.plan.damage.judge import _split
from gtp_fx.strategies import GTP, PPT, Auto, Grouping, Random, Regeneration, Semantic, ToMe, register_strategy

from support.captured import Built, optimised, shared_model
from support.plain_vit import PlainViT, built
from support.printed import in_one_line

pytestmark = pytest.mark.xdist_group("plain-vit-contest")

SOURCE = Built(lambda: built(lambda: PlainViT(depth=3)), (3, 24, 24))
NOWHERE = PPT(blocks=(99,))
"""A strategy without a block that is there."""
AMONG = (Random(), ToMe(), NOWHERE)


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GTP_FX_CACHE", str(tmp_path))
    for name, less in (("_FINALISTS", 2), ("_CALIBRATED", 1), ("_REFINE", 2)):
        monkeypatch.setattr(contest, name, less)


def pictures(count: int = 12) -> Tensor:
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def chosen(among: Any = AMONG, budget: float = 0.7, **options: Any) -> Optimised:
    calibration = Calibration(pictures(), points=1, progress=False, **options)
    return optimised(SOURCE, flops_budget=budget, strategy=Auto(among), calibration=calibration)


@torch.no_grad()
def test_the_least_divergence_wins_and_the_report_says_so() -> None:
    fast = chosen()
    report = fast.report
    best, *others = [row for row in report.contenders if row.images == 12]
    x = pictures()
    assert report.moved == best.moved and best.strategy == str(fast.strategy) == report.strategy
    assert divergence(fast.graph_module(x), shared_model(SOURCE)(x)) == pytest.approx(best.moved, rel=1e-4)
    assert all(best.moved <= row.moved for row in others if row.moved is not None) and best.moved is not None
    assert report.flops_ratio <= 0.7
    # The first round's worse contenders were judged on its images alone.
    cheap = [row for row in report.contenders if row.moved is not None and row.schedule in ("auto", "even")]
    assert 0 < sum(row.images == 8 for row in cheap) <= len(cheap) // 2
    assert {"calibrated", "refined"} & {row.schedule for row in report.contenders}
    # Those left out are named, with the reason.
    (nowhere,) = [row for row in report.contenders if row.strategy == str(NOWHERE)]
    assert "none can lose tokens" in nowhere.refused and nowhere.moved is None and nowhere.images == 0
    text = in_one_line(str(report))
    assert "left out: ppt: this model has 3 blocks" in text and f"{best.moved:.4g} " in text
    assert report.to_dict()["contenders"][0]["strategy"] == best.strategy


@pytest.mark.nightly
def test_all_that_are_registered_take_part() -> None:
    """And a strategy of which only some variants fit is left out with those alone."""
    everyone = {row.name for row in chosen(()).report.contenders}
    assert {"regeneration", "gtp", "tome", "topk", "mergence", "cluster", "idle", "saliency", "random"} <= everyone
    report = chosen((GTP(neighbors=99),)).report
    (misfit,) = [row for row in report.contenders if row.strategy == str(GTP(neighbors=99)) and not row.images]
    assert "more than 99 patch tokens" in misfit.refused and "left out" not in in_one_line(str(report))


def test_what_was_judged_is_not_judged_again(monkeypatch: pytest.MonkeyPatch) -> None:
    among = (Random(),)
    first = chosen(among)
    assert chosen(among, cache=False).report.contenders == first.report.contenders

    def judges_anew(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(pipeline, "apply_plan_unverified", judges_anew)
    again = chosen(among)
    assert (again.schedule, again.strategy) == (first.schedule, first.strategy)
    assert again.report.contenders == first.report.contenders
    with pytest.raises(AssertionError):
        chosen((Random(seed=5),))


def test_where_nobody_can_take_part() -> None:
    with pytest.raises(gtp_fx.UnsupportedModelError, match="none can lose tokens"):
        chosen((NOWHERE,))
    with pytest.raises(gtp_fx.BudgetError, match=r"flops_budget=0\.05 can't be reached"):
        chosen((ToMe(),), budget=0.05)


def test_without_images_it_is_the_default() -> None:
    fast, default = (optimised(SOURCE, flops_budget=0.7, strategy=name) for name in ("auto", "regeneration"))
    assert (fast.strategy, fast.schedule) == (default.strategy, default.schedule)
    assert "no calibration images" in in_one_line(str(fast.report)) and "no calibration images" not in in_one_line(
        str(default.report)
    )
    assert fast.report.contenders == () and fast.report.moved is None
    backend = Options.of_backend({"strategy": "auto", "flops_budget": 0.7})
    assert backend.first_strategy == Regeneration() == Auto().first


def test_what_does_not_go_together() -> None:
    with pytest.raises(gtp_fx.OptionError, match="schedule is 'even': give one"):
        Options.of(flops_budget=0.7, strategy="auto", schedule="even", calibration=pictures())
    with pytest.raises(gtp_fx.OptionError, match="give a list of strategies"):
        Auto("tome")
    with pytest.raises(gtp_fx.OptionError, match="the choice itself"):
        Auto(["tome", "auto"])
    with pytest.raises(gtp_fx.OptionError, match="whole attention maps"):
        Auto([GTP(attention_sparsity=0.5), "tome"])
    with pytest.raises(gtp_fx.OptionError, match="some of these shorten queries alone"):
        Auto(["tome", "semantic"])
    with pytest.raises(gtp_fx.OptionError, match="a choice among all strategies"):

        @register_strategy
        @dataclass(frozen=True)
        class Mine(Grouping):
            name: ClassVar[str] = "auto"


def test_every_variant_is_a_strategy_of_its_own() -> None:
    everyone = Auto().contenders()
    assert len(set(everyone)) == len(everyone) and everyone[0] == Regeneration()
    assert {ToMe(token_scale=False), GTP(graph="spatial"), GTP(token_scale=True)} <= set(everyone)
    assert not any(each.needs_full_maps or each.shortens_queries for each in everyone)
    theta = Auto([GTP(attention_sparsity=0.5)]).contenders()
    assert len(theta) > 4 and all(each.needs_full_maps for each in theta)
    assert Auto(["semantic"]).contenders() == [Semantic(), Semantic(token_scale=True)]


def test_images_are_cut_where_their_number_has_doubled() -> None:
    def sizes(*calls: Any) -> list[int]:
        return [count for _, count in _split([(args, {}) for args in calls])]

    assert sizes((torch.zeros(40, 3),)) == [8, 8, 16, 8]
    assert sizes((torch.zeros(5, 3),), (torch.zeros(30, 3),)) == [5, 3, 8, 16, 3]
    assert sizes(
        (torch.zeros(20, 3), torch.zeros(4)),
    ) == [20], "no call whose tensors hold unlike numbers of images"
    (first, _), (second, _) = _split([((torch.arange(10), 3), {"y": torch.arange(10)})])
    assert first[0][0].tolist() == [*range(8)] and second[1]["y"].tolist() == [8, 9] and second[0][1] == 3
