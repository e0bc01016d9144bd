"""Windows through both doors: the same schedule and numbers at any batch, windows counted for each image."""

from __future__ import annotations

import pytest
import torch

import gtp_fx
from bench.dynamo_door import Door

from support.window_families import SAM, SWIN, Family

SKIP = "regeneration(windows=skip)"


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "batches"),
    [
        pytest.param(SWIN, (2, 5, 1), marks=pytest.mark.nightly),
        pytest.param(SAM, (3, 2), marks=pytest.mark.nightly),
        (SAM, (1,)),
    ],
    ids=lambda value: value.name if isinstance(value, Family) else f"batches {value}",
)
def test_both_doors_agree_at_any_batch(family: Family, batches: tuple[int, ...]) -> None:
    torch._dynamo.reset()
    model = family.model()
    fast = gtp_fx.optimize(model, flops_budget=0.95, example_inputs=family.inputs(), compile=False)
    assert any(row.windows or row.window_tokens for row in fast.report.sites)
    door = Door(flops_budget=0.95)
    compiled = torch.compile(model, backend=door, fullgraph=True)
    for batch in batches:
        x = family.inputs(batch)
        torch.testing.assert_close(compiled(x), fast(x), rtol=1e-5, atol=1e-5)
    assert {made.schedule for made in door.made} == {fast.schedule}
    assert not door.refused


@pytest.mark.nightly
@torch.no_grad()
def test_windows_are_counted_per_image_through_both_doors() -> None:
    torch._dynamo.reset()
    model, x = SWIN.model(), SWIN.inputs()
    fast = gtp_fx.optimize(model, schedule=SWIN.schedule, strategy=SKIP, example_inputs=x, compile=False)
    door = Door(schedule=SWIN.schedule, strategy=SKIP)
    torch.compile(model, backend=door, fullgraph=True)(x)
    assert [row.windows for row in door.made[0].report.sites] == [row.windows for row in fast.report.sites] == [6, 6, 2]
