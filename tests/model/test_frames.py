"""Tokens of their own in each frame or window of one stream: a CLS, registers, and what may be removed beside them."""

from __future__ import annotations

import pytest
import torch

import gtp_fx
from bench.counted import flops

from support.captured import optimised, shared_model
from support.reference_stream import ALPHA
from support.video_nets import APART, Video

STRATEGY = gtp_fx.GTP(alpha=ALPHA, token_scale=True, recovery="mean")
TOLERANCE = 1e-5
"""Of the largest value: sums in another order, in float32."""


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("by_views", [False, True], ids=["convolution", "views"])
@pytest.mark.parametrize("read", APART)
@torch.no_grad()
def test_frames_that_nothing_looks_across_lose_tokens_of_their_own(read: str, by_views: bool) -> None:
    source = Video(read, by_views)
    net = shared_model(source)
    whole = optimised(source, flops_budget=1.0).graph_module
    fast = optimised(source, schedule=[5, 4, 0], strategy=STRATEGY)
    for batch in (2, 3):
        video = source.inputs(batch)
        assert apart(whole(video), net(video)) < TOLERANCE
        assert apart(fast.graph_module(video), net.by_hand(video, [5, 4, 0])) < TOLERANCE


@pytest.mark.parametrize(("kind", "skipping"), [("between", [6, 6, 6]), ("divided", [7, 5]), ("windows", [2, 1])])
@torch.no_grad()
def test_tokens_skip_the_mlp_beside_their_window_s_own(kind: str, skipping: list[int]) -> None:
    source = Video(kind)
    net = shared_model(source)
    whole = optimised(source, flops_budget=1.0).graph_module
    fast = optimised(source, schedule=skipping, strategy=STRATEGY)
    for batch in (2, 3):
        given = source.inputs(batch)
        assert apart(whole(given), net(given)) < TOLERANCE
        assert apart(fast.graph_module(given), net(given, skipping)) < TOLERANCE
    assert flops(fast.graph_module, (given,)) < flops(net, (given,))
