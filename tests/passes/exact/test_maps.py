"""Streams that are maps [B, C, H, W], with convolutions for linear layers: as the same model in [B, H, W, C]."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gtp_fx
from gtp_fx.capture.inputs import call_signature
from gtp_fx.capture.module import capture_module
from gtp_fx.graph.verify import propagate_shapes
from gtp_fx.passes.exact.mark_blocks import mark_blocks
from gtp_fx.passes.exact.normalise import normalise
from gtp_fx.passes.exact.turn_streams import turn_streams

from support.plain_vit import built

WIDTH, HEADS, GRID = 32, 4, 6


class Norm(nn.Module):
    """A norm over channels: by their own mean and variance, or by running ones."""

    def __init__(self, running: bool) -> None:
        super().__init__()
        self.running = nn.BatchNorm2d(WIDTH) if running else None
        if self.running is not None:
            nn.init.normal_(self.running.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(self.running.running_var, 0.5, 2.0)  # type: ignore[arg-type]
        self.scale, self.shift = (nn.Parameter(torch.randn(1, WIDTH, 1, 1)) for _ in range(2))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.running is not None:
            return self.running(x_BCHW)  # type: ignore[no-any-return]
        variance, mean = torch.var(x_BCHW, 1, unbiased=False, keepdim=True), x_BCHW.mean(1, keepdim=True)
        return (x_BCHW - mean) / (variance + 1e-5).sqrt() * self.scale + self.shift


class Block(nn.Module):
    def __init__(self, running: bool, spatial: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(running), Norm(running)
        self.qkv, self.out = nn.Conv2d(WIDTH, 3 * WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)
        self.up, self.down = nn.Conv2d(WIDTH, 4 * WIDTH, 1), nn.Conv2d(4 * WIDTH, WIDTH, 1)
        self.near = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH) if spatial else None

    def attend(self, qkv_BNC: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in qkv_BNC.chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        attended = self.attend(self.qkv(self.norm1(x_BCHW)).flatten(2).mT)
        x_BCHW = x_BCHW + self.out(attended.mT.unflatten(2, (GRID, GRID)))
        y = self.down(F.gelu(self.up(self.norm2(x_BCHW))))
        return x_BCHW + (y if self.near is None else self.near(y))

    def channels_last(self, x_BHWC: Tensor) -> Tensor:
        """The same with linear layers."""

        def norm(layer: Norm) -> Tensor:
            return layer(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

        def through(layer: nn.Conv2d, y: Tensor) -> Tensor:
            return F.linear(y, layer.weight.flatten(1), layer.bias)

        attended = self.attend(through(self.qkv, norm(self.norm1)).flatten(1, 2))
        x_BHWC = x_BHWC + through(self.out, attended.unflatten(1, (GRID, GRID)))
        return x_BHWC + through(self.down, F.gelu(through(self.up, norm(self.norm2))))


class Maps(nn.Module):
    """Two blocks over 6 x 6 patches of images [B, 3, 24, 24]."""

    def __init__(self, running: bool = False, spatial: bool = False, last: bool = False) -> None:
        super().__init__()
        self.patches, self.last = nn.Conv2d(3, WIDTH, 4, 4), last
        self.blocks = nn.ModuleList([Block(running, spatial) for _ in range(2)])

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image)
        if not self.last:
            for block in self.blocks:
                x = block(x)
            return x
        x = x.permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block.channels_last(x)  # type: ignore[operator]
        return x.permute(0, 3, 1, 2)


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(count))


@torch.no_grad()
@pytest.mark.nightly
@pytest.mark.parametrize("running", [False, True])
def test_tokens_skip_the_same_branches(running: bool) -> None:
    made = []
    for last in (False, True):
        model = built(lambda last=last: Maps(running, last=last))  # type: ignore[misc]
        exact = gtp_fx.optimize(model, flops_budget=1.0, example_inputs=images(), compile=False)
        torch.testing.assert_close(exact(images(3)), model(images(3)), rtol=1e-4, atol=1e-5)
        made.append(gtp_fx.optimize(model, schedule=[14, 9], example_inputs=images(), compile=False))
    first, last = made
    assert [site.removed for site in first.report.sites] == [14, 9]
    assert first.report.flops_ratio == pytest.approx(last.report.flops_ratio)
    torch.testing.assert_close(first(images(3)), last(images(3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spatial", [False, True])
def test_maps_are_turned_only_where_tokens_can_then_skip_a_branch(spatial: bool) -> None:
    """A convolution over neighbours ends the branch, so nothing is gained."""
    model = built(lambda: Maps(spatial=spatial))
    marked = normalise(capture_module(model, call_signature(model, images())))
    propagate_shapes(marked, after="normalise")
    marked = mark_blocks(marked)
    assert (turn_streams(marked) is marked) == spatial
