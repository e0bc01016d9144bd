"""The Dynamo backend: the schedule and numbers of `optimize`, one graph, any batch. Compiled tests are few and slow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, fx, nn

import gtp_fx
from bench.dynamo_door import Door
from gtp_fx.capture.dynamo import capture_dynamo
from gtp_fx.model import backend
from gtp_fx.model.pipeline import Optimised, run_passes
from gtp_fx.options.options import Options

from support.captured import optimised, shared_model
from support.zoo import Row, enliven, images, in_tiers, rows

TINY = Row("tiny", "vit_tiny_patch16_224", (8, 8), 1, img_size=(32, 32))


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def tiny(**changes: Any) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 4, "depth": 2, "embed_dim": 64, "num_heads": 2, "init_values": 1e-5}
    model = timm.create_model(TINY.arch, **{**sizes, **changes})
    return enliven(model).eval()


@torch.no_grad()
@rows(by_default=())
def test_both_doors_lead_to_the_same_model(row: Row) -> None:
    model, x = shared_model(row), images(row)
    door = Door(flops_budget=0.6)
    through_dynamo = torch.compile(model, backend=door, fullgraph=True)(x)
    fast = optimised(row, flops_budget=0.6)
    (made,) = door.made
    assert made.schedule == fast.schedule
    assert made.report.flops_ratio == fast.report.flops_ratio
    torch.testing.assert_close(through_dynamo, fast.graph_module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.nightly
@torch.no_grad()
def test_a_second_batch_size_makes_the_same_schedule() -> None:
    model = tiny()
    door = Door(flops_budget=0.6)
    compiled = torch.compile(model, backend=door, fullgraph=True)
    eager = gtp_fx.optimize(model, flops_budget=0.6, compile=False)
    for batch in (2, 5, 7, 1):
        x = images(TINY, batch)
        torch.testing.assert_close(compiled(x), eager(x), rtol=1e-5, atol=1e-5)
    assert len(door.made) == 3, "one for batch 2, one for any batch, one for batch 1, which torch specialises"
    assert len({made.schedule for made in door.made}) == 1


@pytest.mark.parametrize(
    "context",
    [
        pytest.param(torch.no_grad, id="no_grad", marks=pytest.mark.nightly),
        pytest.param(torch.inference_mode, id="inference_mode", marks=pytest.mark.nightly),
        pytest.param(torch.enable_grad, id="grad", marks=pytest.mark.nightly),
        pytest.param(lambda: torch.autocast("cpu", torch.bfloat16), id="autocast"),
    ],
)
def test_every_context_is_the_same_model(context: Callable[[], Any]) -> None:
    model, x = tiny(), images(TINY, 3)
    door = Door(flops_budget=0.6)
    eager = gtp_fx.optimize(model, flops_budget=0.6, compile=False)
    with context():
        found, wanted = torch.compile(model, backend=door, fullgraph=True)(x), eager(x)
    assert door.made[0].schedule == eager.schedule
    # Under autocast both run in bfloat16, rounded at the same places.
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


class Broken(nn.Module):
    """User code that Dynamo can't take into its graph, before and behind the model."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny()
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        logits = self.model(x * 1.0)
        self.seen.append(logits.sum().item())
        return logits.softmax(-1)


@torch.no_grad()
def test_graph_breaks_around_the_model() -> None:
    whole, x = Broken(), images(TINY, 3)
    made: list[Optimised] = []

    def door(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        try:
            made.append(run_passes(capture_dynamo(gm), Options.of(flops_budget=0.6)))
        except gtp_fx.UnsupportedModelError:
            return gm  # as the backend does, with a warning
        return made[-1].graph_module

    found = torch.compile(whole, backend=door)(x)
    fast = gtp_fx.optimize(whole.model, flops_budget=0.6, compile=False)
    assert [one.schedule for one in made] == [fast.schedule]
    torch.testing.assert_close(found, fast(x).softmax(-1), rtol=1e-5, atol=1e-5)


class TwoTowers(nn.Module):
    """An image tower beside a text tower, as CLIP has them: only the first has patch tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.image = tiny()
        self.words = nn.Embedding(50, 64)
        self.text = timm.layers.Attention(64, 4)
        self.project = nn.Linear(64, self.image.num_classes)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.image(x) @ self.project(self.text(self.words(ids)).mean(1)).T


@pytest.mark.nightly
@torch.no_grad()
def test_a_model_inside_a_larger_one() -> None:
    whole = enliven(TwoTowers()).eval()
    x, ids = images(TINY, 3), torch.arange(21).reshape(3, 7)
    door = Door(flops_budget=0.55)
    found = torch.compile(whole, backend=door, fullgraph=True)(x, ids)
    fast = gtp_fx.optimize(whole, flops_budget=0.55, example_inputs=(x, ids), compile=False)
    assert door.made[0].schedule == fast.schedule
    assert any(fast.schedule)
    assert any("text" in refusal.layer for refusal in fast.report.refusals), "the text tower is told of"
    torch.testing.assert_close(found, fast(x, ids), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "door", in_tiers(["backend", "optimize", "optimize, one image"], "optimize", "optimize, one image")
)
def test_compiled_by_name(door: str, request: pytest.FixtureRequest) -> None:
    """The entry point, Inductor, and both doors' compiled forms against eager: float32 in another order, 1e-6 or so."""
    if door != "backend":
        request.getfixturevalue("without_kernels")
    model = tiny()
    x = images(TINY, 1 if "one" in door else 3)
    options = {"flops_budget": 0.6, "strategy": gtp_fx.GTP(alpha=0.3)}
    wanted = gtp_fx.optimize(model, compile=False, **options)(x)
    if door == "backend":
        compiled = torch.compile(model, backend="gtp", options=options, fullgraph=True)
    else:
        compiled = gtp_fx.optimize(model, **options)
    torch.testing.assert_close(compiled(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.nightly
def test_gradients_through_the_compiled_backend() -> None:
    model = tiny(depth=1, global_pool="avg")  # a block whose tokens something reads
    x = images(TINY, 2)
    options = {"schedule": [20]}

    def gradients(run: Any) -> list[Tensor]:
        model.zero_grad()
        run(x).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    eager = gradients(gtp_fx.optimize(model, compile=False, **options))
    compiled = gradients(torch.compile(model, backend="gtp", options=options, fullgraph=True))
    assert len(eager) == len(compiled) == len(list(model.parameters()))
    for mine, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("without_kernels")
@torch.no_grad()
def test_a_graph_without_attention_is_compiled_with_a_warning() -> None:
    """What a graph break leaves before or behind a model; never silent."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    compiled = torch.compile(net, backend=backend.gtp, options={"flops_budget": 0.7})
    x = torch.randn(2, 3, 8, 8)
    with pytest.warns(UserWarning, match="no self-attention over patch tokens"):
        found = compiled(x)
    torch.testing.assert_close(found, net(x))


def test_errors_reach_the_user() -> None:
    compiled = torch.compile(tiny(), backend="gtp", options={"flops_budget": 1.5})
    with pytest.raises(Exception, match=r"flops_budget=1\.5 is no ratio"):
        compiled(images(TINY, 2))
