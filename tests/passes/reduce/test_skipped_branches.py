"""Tokens that skip a branch are as the attention left them, the others as the original has them, exactly.

B images, C channels, maps of 6 x 6 patches, N tokens of a window. Each net has one block of both halves; what is
compared is the original's own values after each half.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gtp_fx
from bench.counted import flops

from support.plain_vit import built

WIDTH, HEADS, GRID, WINDOW = 32, 4, 6, 3


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 4 * GRID, 4 * GRID, generator=torch.Generator().manual_seed(count))


def into_windows(x_BCHW: Tensor) -> Tensor:
    """Windows as more images, [B * windows, C, 3, 3]."""
    x = x_BCHW.unflatten(2, (-1, WINDOW)).unflatten(4, (-1, WINDOW))
    return x.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def out_of_windows(x_WChw: Tensor) -> Tensor:
    many = GRID // WINDOW
    x = x_WChw.view(-1, many, many, x_WChw.shape[1], WINDOW, WINDOW)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, x_WChw.shape[1], GRID, GRID)


class Norm(nn.Module):
    """A norm over channels by hand, [B, C, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = (nn.Parameter(torch.randn(1, WIDTH, 1, 1)) for _ in range(2))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        variance, mean = torch.var(x_BCHW, 1, unbiased=False, keepdim=True), x_BCHW.mean(1, keepdim=True)
        return (x_BCHW - mean) / (variance + 1e-5).sqrt() * self.scale + self.shift


class Maps(nn.Module):
    """A map [B, C, 6, 6] whose block attends over all of it, with an MLP of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.norm1, self.norm2 = Norm(), Norm()
        self.qkv, self.out = nn.Conv2d(WIDTH, 3 * WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)
        self.up, self.down = nn.Conv2d(WIDTH, 4 * WIDTH, 1), nn.Conv2d(4 * WIDTH, WIDTH, 1)
        self.near = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def attend(self, qkv_BCHW: Tensor) -> Tensor:
        q, k, v = (t.flatten(2).unflatten(1, (HEADS, -1)).mT for t in qkv_BCHW.chunk(3, 1))
        return F.scaled_dot_product_attention(q, k, v).mT.reshape(-1, WIDTH, *qkv_BCHW.shape[2:])

    def attended(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.out(self.attend(self.qkv(self.norm1(x_BCHW))))

    def mlp(self, x_BCHW: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm2(x_BCHW))))  # type: ignore[no-any-return]

    def halves(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The map after each half of the block."""
        x = self.attended(self.patches(image))
        return x, x + self.mlp(x)

    def forward(self, image: Tensor) -> Tensor:
        return self.halves(image)[1]


class ConvolvedFirst(Maps):
    """Neighbours are mixed before the MLP, which needs the whole map for that alone."""

    def mlp(self, x_BCHW: Tensor) -> Tensor:
        return super().mlp(self.near(x_BCHW))


class WindowsAsImages(Maps):
    """Windows are images of their own throughout the block."""

    def halves(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = self.attended(into_windows(self.patches(image)))
        return out_of_windows(x), out_of_windows(x + self.mlp(x))


class WindowsInAttention(Maps):
    """Windows are images of their own within the attention, which makes its projections there."""

    def attended(self, x_BCHW: Tensor) -> Tensor:
        y = into_windows(self.norm1(x_BCHW))
        return x_BCHW + self.out(out_of_windows(self.attend(self.qkv(y))))


@torch.no_grad()
@pytest.mark.parametrize("kind", [Maps, ConvolvedFirst, WindowsAsImages, WindowsInAttention])
def test_tokens_are_as_one_half_of_the_block_leaves_them_or_the_other(kind: type[Maps]) -> None:
    check(built(kind), 5)


def check(model: nn.Module, skipping: int) -> None:
    """skipping: tokens of each window, or of the whole map, that skip the MLP."""
    windowed = "Windows" in type(model).__name__
    exact = gtp_fx.optimize(model, flops_budget=1.0, example_inputs=images(), compile=False)
    torch.testing.assert_close(exact(images(3)), model(images(3)), rtol=1e-4, atol=1e-5)
    made = gtp_fx.optimize(model, schedule=[skipping], example_inputs=images(), compile=False)
    for count in (2, 3):
        attended, whole = model.halves(images(count))  # type: ignore[operator]
        out = made(images(count))
        stays, runs = (torch.isclose(out, half, rtol=1e-4, atol=1e-4).all(1) for half in (attended, whole))
        assert (stays ^ runs).all()
        by_window = into_windows(stays[:, None].float()) if windowed else stays[:, None].float()
        assert (by_window.sum((1, 2, 3)) == skipping).all()
    ratio = flops(made, [images()]) / flops(model, [images()])
    assert ratio == pytest.approx(made.report.flops_ratio, abs=1e-6) and ratio < 1
