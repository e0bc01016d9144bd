"""Detection and segmentation heads on windowed backbones: maps of unchanged shape, exact at budget 1.0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

import gtp_fx
from bench.live_weights import enliven

from support.captured import Built, optimised, shared_model

SKIP = gtp_fx.strategies.Regeneration(windows="skip")
SWIN = {"img_size": 112, "depths": (2, 1), "num_heads": (2, 4), "embed_dim": 32}


class Pyramid(nn.Module):
    """timm's features_only, channels last, feeding an FPN."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model(
            "swin_tiny_patch4_window7_224", features_only=True, out_indices=(0, 1), **SWIN
        )
        self.fpn = FeaturePyramidNetwork(self.backbone.feature_info.channels(), 16)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = [level.permute(0, 3, 1, 2) for level in self.backbone(x)]
        return self.fpn({str(i): level for i, level in enumerate(maps)})


def upernet() -> nn.Module:
    backbone = transformers.SwinConfig(
        image_size=112, embed_dim=16, depths=[2, 1], num_heads=[2, 4], out_features=["stage1", "stage2"]
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=16, num_labels=5, use_auxiliary_head=False, pool_scales=[1, 2]
    )
    return transformers.UperNetForSemanticSegmentation(config)


def maps(output: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(dict(output)) if isinstance(leaf, Tensor)]


@torch.no_grad()
@pytest.mark.parametrize(
    "make",
    [pytest.param(Pyramid, id="Pyramid"), pytest.param(upernet, id="upernet", marks=pytest.mark.nightly)],
)
def test_heads_see_maps_of_the_same_shape(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    source = Built(lambda: enliven(make()).eval(), (3, 112, 112))
    x = source.inputs()
    wanted = maps(shared_model(source)(x))
    exact = maps(optimised(source, flops_budget=1.0).graph_module(x))
    fast = optimised(source, schedule=[20, 20, 20], strategy=SKIP)
    found = maps(fast.graph_module(x))
    assert all(row.windows for row in fast.report.sites) and len(fast.report.sites) == 3
    assert [m.shape for m in found] == [m.shape for m in exact] == [m.shape for m in wanted]
    for a, b, c in zip(exact, wanted, found, strict=True):
        assert ((a - b).abs().max() / b.abs().max()) < 1e-5
        assert ((c - b).abs().max() / b.abs().max()) > 1e-4


@pytest.mark.nightly
@pytest.mark.parametrize("fused", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_attention_dropout_in_windows_is_refused_by_name(fused: bool) -> None:
    """The scores' attention has no dropout: in training, a branch would lose it without a word."""
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, attn_drop_rate=0.1, **SWIN)
    for block in (m for m in swin.modules() if hasattr(m, "fused_attn")):
        block.fused_attn = fused
    x = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    fast = gtp_fx.optimize(enliven(swin).eval(), schedule=[20, 20, 20], strategy=SKIP, example_inputs=x, compile=False)
    with pytest.raises(gtp_fx.GtpError, match="attention dropout is active"):
        fast.train()(x)
