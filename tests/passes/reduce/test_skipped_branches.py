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

    def chosen_from(self, x_BCHW: Tensor) -> Tensor:
        """The patches of which equally many skip the MLP, [windows or images, N, C]."""
        return x_BCHW.flatten(2).mT

    def forward(self, image: Tensor) -> Tensor:
        return self.halves(image)[1]


class ConvolvedFirst(Maps):
    """Neighbours are mixed before the MLP, which needs the whole map for that alone."""

    def mlp(self, x_BCHW: Tensor) -> Tensor:
        return super().mlp(self.near(x_BCHW))


class NormedOverAll(Maps):
    """A norm over groups of channels and all places before the last convolution, which alone can be skipped."""

    def mlp(self, x_BCHW: Tensor) -> Tensor:
        return self.down(F.group_norm(F.gelu(self.up(x_BCHW)), 4))  # type: ignore[no-any-return]


class TwoMlps(Maps):
    """A second MLP follows, after an encoding of places by a convolution. The same tokens skip both."""

    def forward(self, image: Tensor, skipping: int = 0) -> Tensor:
        """skipping: tokens of the map that skip both MLPs, those of lowest score in the block's attention."""
        x = self.patches(image)
        runs = self.runs(self.norm1(x), skipping) if skipping else 1
        x = self.attended(x)
        x = x + runs * self.mlp(x)
        x = x + self.near(x)
        return x + runs * self.mlp(x)

    def runs(self, x_BCHW: Tensor, skipping: int) -> Tensor:
        """1 where a token runs the MLPs, 0 where it skips them: [B, 1, H, W]."""
        q, k, _ = (t.flatten(2).unflatten(1, (HEADS, -1)).mT for t in self.qkv(x_BCHW).chunk(3, 1))
        weights_BHNN = (q @ k.mT / (WIDTH // HEADS) ** 0.5).softmax(-1)
        score_BN = weights_BHNN.diagonal(0, 2, 3).amax(1) * weights_BHNN.sum(2).amax(1)
        return (score_BN.argsort(1).argsort(1) >= skipping).unflatten(1, (1, GRID, GRID)).float()


class Windowed(Maps):
    def chosen_from(self, x_BCHW: Tensor) -> Tensor:
        return super().chosen_from(into_windows(x_BCHW))


class WindowsAsImages(Windowed):
    """Windows are images of their own throughout the block."""

    def halves(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = self.attended(into_windows(self.patches(image)))
        return out_of_windows(x), out_of_windows(x + self.mlp(x))


class WindowsInAttention(Windowed):
    """Windows are images of their own within the attention, which makes its projections there."""

    def attended(self, x_BCHW: Tensor) -> Tensor:
        y = into_windows(self.norm1(x_BCHW))
        return x_BCHW + self.out(out_of_windows(self.attend(self.qkv(y))))


class WindowsAfterChannels(Windowed):
    """The stream is [B, C, windows, N], with convolutions of one over both."""

    def attend(self, qkv_BCWN: Tensor) -> Tensor:
        q, k, v = (t.unflatten(1, (HEADS, -1)).permute(0, 3, 1, 4, 2) for t in qkv_BCWN.chunk(3, 1))
        return F.scaled_dot_product_attention(q, k, v).permute(0, 2, 4, 1, 3).flatten(1, 2)

    def halves(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = into_windows(self.patches(image)).flatten(2).unflatten(0, (image.shape[0], -1)).transpose(1, 2)
        x = self.attended(x)
        return x, x + self.mlp(x)

    def chosen_from(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(0, 1)


class TokenBesideWindows(Windowed):
    """A token of each window attends together with its patches, and says how windows are mixed; it isn't kept."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(WIDTH))

    def attended(self, x_BCHW: Tensor) -> Tensor:
        y = into_windows(self.norm1(x_BCHW)).flatten(2)
        y = torch.cat([self.token[:, None].expand(y.shape[0], -1, 1), y], 2)
        y = self.attend(self.qkv(y[..., None])).flatten(2)
        of_windows, windows = (t.unflatten(0, (x_BCHW.shape[0], -1)) for t in (y[..., 0], y[..., 1:]))
        mixed = torch.einsum("bij,bjcn->bicn", (of_windows @ of_windows.mT).softmax(-1), windows)
        return x_BCHW + self.out(out_of_windows(mixed.flatten(0, 1).unflatten(2, (WINDOW, WINDOW))))


class TokenInWindows(Windowed):
    """The stream is [B * windows, 1 + N, C]: a token of each window stays with its patches."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(2)])

    def through(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        return F.linear(x, layer.weight.flatten(1), layer.bias)

    def mixed(self, y: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.through(self.qkv, y).chunk(3, -1))
        return self.through(self.out, F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def halves(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = into_windows(self.patches(image)).flatten(2).mT
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        x = x + self.mixed(self.norms[0](x))
        return x, x + self.through(self.down, F.gelu(self.through(self.up, self.norms[1](x))))

    def chosen_from(self, x: Tensor) -> Tensor:
        return x[:, 1:]


class TokenInWindowsThatAreOne(TokenInWindows):
    """The patches of all windows attend together, with the mean of the windows' tokens."""

    def mixed(self, y: Tensor) -> Tensor:
        many = (GRID // WINDOW) ** 2
        patches = out_of_windows(y[:, 1:].mT.unflatten(2, (WINDOW, WINDOW))).flatten(2).mT
        y = super().mixed(torch.cat([y[:, :1].view(-1, many, 1, WIDTH).mean(1), patches], 1))
        patches = into_windows(y[:, 1:].mT.unflatten(2, (GRID, GRID))).flatten(2).mT
        return torch.cat([y[:, :1].expand(-1, many, -1).reshape(-1, 1, WIDTH), patches], 1)


class TokensOfTheImage(TokenInWindows):
    """The stream is [B, 1 + patches + 1, C]: patches attend in windows, and there are two MLPs, for all tokens."""

    def halves(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x, token = self.patches(image).flatten(2).mT, self.token.expand(image.shape[0], -1, -1)
        x = torch.cat([token, x, -token], 1)
        y = into_windows(self.norms[0](x)[:, 1:-1].mT.unflatten(2, (GRID, GRID)))
        y = self.through(self.out, out_of_windows(self.attend(self.qkv(y))).flatten(2).mT)
        attended = x = x + F.pad(y, (0, 0, 1, 1))
        for norm in self.norms:
            x = x + self.through(self.down, F.gelu(self.through(self.up, norm(x))))
        return attended, x

    def chosen_from(self, x: Tensor) -> Tensor:
        return into_windows(x[:, 1:-1].mT.unflatten(2, (GRID, GRID))).flatten(2).mT


class WindowsOfTheirOwn(TokenInWindows):
    """The stream is [B, windows, N, C], and attention [B, windows, heads, N, D], with a bias of each window."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn((GRID // WINDOW) ** 2, HEADS, WINDOW**2, WINDOW**2))

    def mixed(self, y: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(2, 3) for t in self.through(self.qkv, y).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, self.bias).transpose(2, 3).flatten(3)
        return self.through(self.out, y)

    def halves(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = into_windows(self.patches(image)).flatten(2).mT.unflatten(0, (image.shape[0], -1))
        x = x + self.mixed(self.norms[0](x))
        return x, x + self.through(self.down, F.gelu(self.through(self.up, self.norms[1](x))))

    def chosen_from(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)


class HeadsBeforeWindows(WindowsOfTheirOwn):
    """Attention is [B, heads, windows, N, D], with one bias for all windows."""

    def mixed(self, y: Tensor) -> Tensor:
        qkv = (t.unflatten(-1, (HEADS, -1)).permute(0, 3, 1, 2, 4) for t in self.through(self.qkv, y).chunk(3, -1))
        y = F.scaled_dot_product_attention(*qkv, self.bias[0, :, None]).permute(0, 2, 3, 1, 4).flatten(3)
        return self.through(self.out, y)


class OneHead(WindowsOfTheirOwn):
    """Attention is [B, windows, N, C], spelled out: one head without a dimension."""

    def mixed(self, y: Tensor) -> Tensor:
        q, k, v = self.through(self.qkv, y).chunk(3, -1)
        return self.through(self.out, (q @ k.mT / WIDTH**0.5).softmax(-1) @ v)


KINDS = [
    Maps,
    ConvolvedFirst,
    pytest.param(NormedOverAll, marks=pytest.mark.nightly),
    WindowsAsImages,
    pytest.param(WindowsInAttention, marks=pytest.mark.nightly),
    WindowsAfterChannels,
    TokenBesideWindows,
    pytest.param(TokenInWindows, marks=pytest.mark.nightly),
    pytest.param(TokenInWindowsThatAreOne, marks=pytest.mark.nightly),
    TokensOfTheImage,
    WindowsOfTheirOwn,
    pytest.param(HeadsBeforeWindows, marks=pytest.mark.nightly),
    OneHead,
]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_as_one_half_of_the_block_leaves_them_or_the_other(kind: type[Maps]) -> None:
    check(built(kind), 5)


def check(model: nn.Module, skipping: int) -> None:
    """skipping: tokens of each window, or of the whole map, that skip the MLP."""
    exact = gtp_fx.optimize(model, flops_budget=1.0, example_inputs=images(), compile=False)
    torch.testing.assert_close(exact(images(3)), model(images(3)), rtol=1e-4, atol=1e-5)
    nothing = gtp_fx.strategies.Regeneration(branch_mean=0)
    made = gtp_fx.optimize(model, schedule=[skipping], strategy=nothing, example_inputs=images(), compile=False)
    for count in (2, 3):
        attended, whole = (model.chosen_from(half) for half in model.halves(images(count)))  # type: ignore[operator]
        out = model.chosen_from(made(images(count)))  # type: ignore[operator]
        stays, runs = (torch.isclose(out, half, rtol=1e-4, atol=1e-4).all(-1) for half in (attended, whole))
        assert (stays ^ runs).all()
        assert (stays.sum(1) == skipping).all()
    ratio = flops(made, [images()]) / flops(model, [images()])
    assert ratio == pytest.approx(made.report.flops_ratio, abs=1e-6) and ratio < 1


@torch.no_grad()
def test_the_same_tokens_skip_every_mlp_before_the_next_attention() -> None:
    model = built(TwoMlps)
    made = gtp_fx.optimize(model, schedule=[7], strategy="gtp", example_inputs=images(), compile=False)
    for count in (2, 3):
        torch.testing.assert_close(made(images(count)), model(images(count), 7), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(made(images()), model(images()), atol=1e-2)
    ratio = flops(made, [images()]) / flops(model, [images()])
    assert ratio == pytest.approx(made.report.flops_ratio, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("branch", ["idle", pytest.param("recover", marks=pytest.mark.nightly)])
def test_tokens_that_are_no_patches_never_skip(branch: str) -> None:
    model, x, strategy = built(TokensOfTheImage), images(3), gtp_fx.GTP(branch=branch)
    made = gtp_fx.optimize(model, schedule=[5], strategy=strategy, example_inputs=images(), compile=False)
    torch.testing.assert_close(made(x)[:, [0, -1]], model(x)[:, [0, -1]], rtol=1e-4, atol=1e-5)
    ratio = flops(made, [x]) / flops(model, [x])
    assert ratio == pytest.approx(made.report.flops_ratio, abs=1e-6) and ratio < 1


@torch.no_grad()
@pytest.mark.parametrize("kind", [TwoMlps, pytest.param(TokenInWindowsThatAreOne, marks=pytest.mark.nightly)])
def test_recovering_is_counted_for_every_mlp(kind: type[Maps]) -> None:
    """Neighbours' results are a product, which tokens that get nothing do without."""
    model, ratios = built(kind), []
    for branch in ("recover", "idle"):
        strategy = gtp_fx.GTP(branch=branch)
        made = gtp_fx.optimize(model, schedule=[4], strategy=strategy, example_inputs=images(), compile=False)
        ratios.append(flops(made, [images()]) / flops(model, [images()]))
        assert ratios[-1] == pytest.approx(made.report.flops_ratio, abs=1e-6)
    assert ratios[0] > ratios[1]
