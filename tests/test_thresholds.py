"""theta below 1 without ranking maps: a threshold a head, measured on unlabelled images."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gtp_fx

from zoo import BY_NAME, DEPTH, build, images

ROW = BY_NAME["deit-distilled"]
SPARSE = gtp_fx.GTP(attention_sparsity=0.7)
COUNTS = [15, 20, 0]
BAD: list[Any] = [(), 0.1, [[0.1]], ((0.1, 2.0),), ((0.1, "a"),)]


@torch.no_grad()
def test_for_one_image_thresholds_are_the_ranks() -> None:
    """Measured on the image itself, a threshold is its own smallest entry that stays: the same entries are dropped."""
    model, x = build(ROW), images(ROW, 1)
    exact = gtp_fx.optimize(model, schedule=COUNTS, strategy=SPARSE, compile=False)
    thresholds = exact.attention_thresholds(x)
    assert len(thresholds) == DEPTH and all(len(row) == model.blocks[0].attn.num_heads for row in thresholds)
    assert all(0 < value < 0.1 for row in thresholds for value in row)
    strategy = gtp_fx.GTP(attention_sparsity=0.7, thresholds=thresholds)
    fast = gtp_fx.optimize(model, schedule=exact.schedule, strategy=strategy, compile=False)
    # What no output depends on is dead again: nothing needs whole maps.
    assert fast.report.flops_ratio < exact.report.flops_ratio
    whole = gtp_fx.optimize(model, schedule=COUNTS, compile=False)
    wanted = exact(x)
    assert (fast(x) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert (whole(x) - wanted).abs().max() > 1e-3 * wanted.abs().max(), "theta that changes nothing proves nothing"


@torch.no_grad()
def test_over_several_images_it_is_their_mean() -> None:
    model, x = build(ROW), images(ROW, 3)
    exact = gtp_fx.optimize(model, schedule=COUNTS, strategy=SPARSE, compile=False)
    single = torch.tensor([exact.attention_thresholds(x[i : i + 1]) for i in range(3)]).mean(dim=0)
    for together in (x, [x[:1], x[1:]]):
        assert torch.allclose(torch.tensor(exact.attention_thresholds(together)), single, rtol=1e-5)


def test_a_model_without_theta_has_no_thresholds() -> None:
    fast = gtp_fx.optimize(build(ROW), schedule=COUNTS, compile=False)
    with pytest.raises(gtp_fx.OptionError, match="ranks no attention map"):
        fast.attention_thresholds(images(ROW, 1))


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_thresholds_are_refused(bad: Any) -> None:
    with pytest.raises(gtp_fx.OptionError, match="thresholds"):
        gtp_fx.GTP(attention_sparsity=0.7, thresholds=bad)


def test_thresholds_want_theta_and_their_own_model() -> None:
    with pytest.raises(gtp_fx.OptionError, match="give that theta too"):
        gtp_fx.GTP(thresholds=((0.1,),))
    model = build(ROW)
    for thresholds in (((0.1,) * 3,), ((0.1,),) * 3):
        with pytest.raises(gtp_fx.OptionError, match="measured on another model"):
            gtp_fx.optimize(model, schedule=COUNTS, strategy=gtp_fx.GTP(attention_sparsity=0.7, thresholds=thresholds))
