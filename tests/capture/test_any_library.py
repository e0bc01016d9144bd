"""No library is special: torchvision, open_clip and a ViT from scratch enter both ways, like timm and HuggingFace."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

import gtp_fx
from bench.dynamo_door import Door
from bench.live_weights import enliven
from bench.scratch_vit import Layer, ScratchViT

from support.captured import Built, optimised, shared_model


def torchvision_vit() -> nn.Module:
    model = torchvision.models.VisionTransformer(64, 8, 3, 4, 64, 128, num_classes=10)
    return enliven(model).eval()


def open_clip_visual() -> nn.Module:
    import open_clip

    model = open_clip.create_model("ViT-B-32").visual
    del model.transformer.resblocks[3:]
    return enliven(model).eval()


def torchvision_swin() -> nn.Module:
    model = torchvision.models.swin_transformer.SwinTransformer([4, 4], 32, [2, 1], [2, 4], [7, 7], num_classes=10)
    return enliven(model).eval()


def scratch() -> nn.Module:
    torch.manual_seed(0)
    return enliven(ScratchViT(size=64, patch=8, width=64, depth=3, heads=4)).eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "side"),
    [
        pytest.param(torchvision_vit, 64, marks=pytest.mark.nightly),
        pytest.param(torchvision_swin, 112, marks=pytest.mark.nightly),
        pytest.param(open_clip_visual, 224, marks=pytest.mark.nightly),
        (scratch, 64),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_exact_at_one_and_the_same_schedule_through_both_doors(make: Callable[[], nn.Module], side: int) -> None:
    torch._dynamo.reset()
    source = Built(make, (3, side, side))
    model, x = shared_model(source), torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    wanted = model(x)
    exact = optimised(source, flops_budget=1.0).graph_module
    assert ((exact(x) - wanted).abs().max() / wanted.abs().max()) < 1e-5
    fast = optimised(source, flops_budget=0.6)
    assert any(fast.schedule)
    assert fast.report.flops_ratio <= 0.6
    door = Door(flops_budget=0.6)
    through_dynamo = torch.compile(model, backend=door, fullgraph=True)(x)
    assert [made.schedule for made in door.made] == [fast.schedule]
    found = fast.graph_module(x)
    torch.testing.assert_close(through_dynamo, found, rtol=1e-5, atol=1e-5)
    assert (found - wanted).abs().max() > 1e-3


def test_spelled_out_attention_is_fused_in_a_model_from_scratch() -> None:
    fast = gtp_fx.optimize(scratch(), flops_budget=1.0, example_inputs=torch.randn(2, 3, 64, 64), compile=False)
    operators = [str(node.target) for node in fast.graph_module.graph.nodes]
    assert sum("scaled_dot_product" in operator for operator in operators) == 3
    assert not any("softmax" in operator or "einsum" in operator for operator in operators)


class AnySize(nn.Module):
    """No position embedding: takes images of any size, and says nothing about which."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 64, 8, 8)
        self.layers = nn.Sequential(Layer(64, 4), Layer(64, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.embed(x).flatten(2).transpose(1, 2)).mean(1)


@pytest.mark.nightly
@torch.no_grad()
def test_a_new_image_size_is_a_new_specialisation() -> None:
    """Dynamo makes the sides symbolic at the second size; each size gets a graph and a schedule of its own."""
    torch._dynamo.reset()
    model = enliven(AnySize()).eval()
    door = Door(flops_budget=0.6)
    compiled = torch.compile(model, backend=door, fullgraph=True)
    for shape in ((2, 3, 64, 64), (3, 3, 64, 64), (3, 3, 96, 64), (5, 3, 64, 104)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        wanted = gtp_fx.optimize(model, flops_budget=0.6, example_inputs=x[:2], compile=False)
        torch.testing.assert_close(compiled(x), wanted(x), rtol=1e-5, atol=1e-5)
        assert door.made[-1].schedule == wanted.schedule
    assert len({tuple(made.schedule) for made in door.made}) == 3
