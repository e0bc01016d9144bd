"""Residuals that are no sums with a fixed share of the stream: gates, projections, streams that are mixed."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import gtp_fx
from bench.counted import flops

from support.captured import optimised, shared_model
from support.mixing_nets import RESIDUALS, Residual
from support.reference_stream import ALPHA

STRATEGY = gtp_fx.GTP(alpha=ALPHA, token_scale=True)
SCHEDULE = [8, 6, 0]
TOLERANCE = 1e-5
"""Of the largest value: sums in another order, in float32."""


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("kind", RESIDUALS)
@torch.no_grad()
def test_tokens_leave_with_all_of_their_state(kind: str) -> None:
    source = Residual(kind)
    net = shared_model(source)
    whole = optimised(source, flops_budget=1.0).graph_module
    fast = optimised(source, schedule=SCHEDULE, strategy=STRATEGY).graph_module
    for batch in (2, 3):
        images = source.inputs(batch)
        assert apart(whole(images), net(images)) < TOLERANCE
        assert apart(fast(images), net.by_hand(images, SCHEDULE)) < TOLERANCE
    assert flops(fast, (images,)) < 0.9 * flops(net, (images,))


def test_a_graph_that_is_made_while_torch_counts_is_the_same_and_not_counted() -> None:
    """A counter keeps torch from opening composite operators, of which a cell is one."""
    net = Residual("recurrent unit").model().eval()
    images = Residual("recurrent unit").inputs(2)
    fast = gtp_fx.optimize(net, schedule=SCHEDULE, example_inputs=images, compile=False).train()
    counted = []
    for _ in range(2):  # training has a graph of its own, made at the first of these calls
        with FlopCounterMode(display=False) as counter:
            fast(images)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1]
