"""Every strategy is what its publication says: equal to an eager reference written from it, on live weights.

Tolerances: the reference is float64 and the graph float32; over four blocks that was up to 2e-6 of the largest logit.
Where the two chose other tokens the difference is more than 1e-3, so a tie that rounding decides would show. Seeds are
fixed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
from torch import Tensor
from torch.nn import functional as F

import gtp_fx

from support import reference_strategies as by_hand
from support.reference_strategies import Told, strategy_reference
from support.zoo import BY_NAME, WITH_DEAD_TOKENS, build, images

DEPTH = 4
Made = tuple[gtp_fx.strategies.Grouping, Told, tuple[int, ...]]


def _cls(seen: by_hand.Seen) -> list[float]:
    return seen.cls


def _contrast(x: Tensor, side: int) -> Callable[[], list[float]]:
    """Squared distance of each pixel from the mean of the 7 x 7 around it, averaged over a patch."""
    around = F.avg_pool2d(x.double(), 7, stride=1, padding=3, count_include_pad=False)
    heat = F.avg_pool2d((x.double() - around).square().sum(1, keepdim=True), side)
    return iter([row.flatten().tolist() for row in heat]).__next__


CASES: dict[str, Callable[[], Made]] = {
    "tome": lambda: (gtp_fx.ToMe(), Told(by_hand.tome, told=True), (20, 0, 30, 10)),
    "tome-not-told": lambda: (gtp_fx.ToMe(token_scale=False), Told(by_hand.tome), (20, 30, 0, 10)),
    "tome-more-than-half": lambda: (gtp_fx.ToMe(), Told(by_hand.tome, told=True), (0, 170, 15, 0)),
    "topk": lambda: (gtp_fx.TopK(), Told(by_hand.topk), (20, 0, 60, 10)),
    "topk-normalised": lambda: (
        gtp_fx.TopK(normalised=True),
        Told(functools.partial(by_hand.topk, normalised=True)),
        (60, 1, 30, 0),
    ),
    "topk-received": lambda: (
        gtp_fx.TopK(score="broadcast-mean"),
        Told(functools.partial(by_hand.topk, scores=lambda seen: seen.received)),
        (20, 0, 60, 10),
    ),
    "ppt-prunes": lambda: (
        gtp_fx.strategies.PPT(threshold=0.0, blocks=(0, 2)),
        Told(functools.partial(by_hand.ppt, threshold=0.0), told=True),
        (50, 0, 60, 0),
    ),
    "ppt-pools": lambda: (
        gtp_fx.strategies.PPT(threshold=1.0),
        Told(functools.partial(by_hand.ppt, threshold=1.0), told=True),
        (0, 50, 60, 40),
    ),
    "mergence": lambda: (gtp_fx.strategies.Mergence(), Told(by_hand.mergence), (20, 0, 60, 10)),
    "regeneration": lambda: (
        gtp_fx.strategies.Regeneration(),
        Told(by_hand.regeneration, told=True),
        (20, 0, 60, 10),
    ),
    "regeneration-not-told": lambda: (
        gtp_fx.strategies.Regeneration(token_scale=False, difficulty=2.0),
        Told(functools.partial(by_hand.regeneration, difficulty=2.0)),
        (0, 150, 20, 10),
    ),
    "cluster": lambda: (
        gtp_fx.strategies.Cluster(after=1),
        Told(functools.partial(by_hand.cluster, sides=(14, 14))),
        (0, 120, 0, 0),
    ),
    "idle": lambda: (gtp_fx.strategies.Idle(), Told(by_hand.tome, idles=_cls), (20, 0, 60, 40)),
    "halting": lambda: (
        gtp_fx.strategies.Halting(beta=0.0),
        Told(functools.partial(by_hand.halting, beta=0.0)),
        (20, 60, 0, 10),
    ),
    "semantic": lambda: (
        gtp_fx.strategies.Semantic(),
        Told(functools.partial(by_hand.semantic, sides=(14, 14)), before=True, to_all=True),
        (20, 0, 105, 30),
    ),
    "semantic-told": lambda: (
        gtp_fx.strategies.Semantic(token_scale=True),
        Told(functools.partial(by_hand.semantic, sides=(14, 14)), told=True, before=True, to_all=True),
        (0, 61, 86, 0),
    ),
}


VARIANTS = (
    "tome-not-told",
    "tome-more-than-half",
    "topk-normalised",
    "topk-received",
    "ppt-pools",
    "regeneration-not-told",
    "semantic-told",
)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.nightly if case in VARIANTS else ()) for case in CASES]
)
@pytest.mark.parametrize("name", ["deit"])
def test_equals_the_reference(name: str, case: str) -> None:
    strategy, how, schedule = CASES[case]()
    row = BY_NAME[name]
    model, x = build(row, depth=DEPTH), images(row, 3)
    fast = gtp_fx.optimize(
        model, schedule=list(schedule), strategy=strategy, compile=False, disabled_passes=WITH_DEAD_TOKENS
    )
    found, wanted = fast(x), strategy_reference(model, x, schedule, how)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert (model(x) - wanted).abs().max() > 1e-4 * wanted.abs().max(), "a schedule that changes nothing proves nothing"


@pytest.mark.nightly
def test_saliency_equals_the_reference() -> None:
    """Before the first block, by the built-in map; two sizes of groups."""
    row = BY_NAME["deit"]
    model, x = build(row, depth=DEPTH), images(row, 3)
    for fused, removed in ((4, 60), (30, 7)):
        heat = _contrast(x, 16)
        how = Told(lambda seen, heat=heat, fused=fused: by_hand.saliency(seen, heat, fused), before=True)
        schedule = (removed, 0, 0, 0)
        strategy = gtp_fx.strategies.Saliency(fused=fused)
        fast = gtp_fx.optimize(
            model, schedule=list(schedule), strategy=strategy, compile=False, disabled_passes=WITH_DEAD_TOKENS
        )
        found, wanted = fast(x), strategy_reference(model, x, schedule, how)
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_random_is_spread_and_the_same_for_every_image() -> None:
    """Two seeds, and two blocks of one, leave different places; a half of each quarter of the grid or so is gone."""
    row = BY_NAME["deit"]
    model, x = build(row, depth=DEPTH), images(row, 3)
    chosen = []
    for seed in (0, 1):
        fast = gtp_fx.optimize(
            model, schedule=[98, 0, 0, 0], strategy=gtp_fx.strategies.Random(seed=seed), compile=False
        )
        (found,) = fast.provenance(x)
        assert (found.index == found.index[:1]).all()
        quarters = [int(((found.index[0] >= 49 * i) & (found.index[0] < 49 * (i + 1))).sum()) for i in range(4)]
        assert all(14 <= count <= 35 for count in quarters), quarters
        chosen.append(set(found.index[0].tolist()))
    assert 30 <= len(chosen[0] & chosen[1]) <= 68
