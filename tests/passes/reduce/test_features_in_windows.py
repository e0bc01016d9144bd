"""What blocks whose windows rest do to features: it stays what it is on rows, and runs once for all of them.

Images are alike within each cell of a window. There a cell's mean is each of its tokens, and a window that rests gets
what it would have got awake, so the result is the model's own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gtp_fx
from gtp_fx.strategies import Regeneration

WIDTH, SIDE, PATCH = 16, 7, 2
CELLS = torch.tensor([4, 3, 4, 3])
"""Places of the cells along two windows."""


class Block(nn.Module):
    """Attention in windows of a map [B, H, W, C], and a gated MLP."""

    def __init__(self, change: Callable[[Tensor], Tensor], dropped: float) -> None:
        super().__init__()
        self.change, self.dropped = change, dropped
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.gain, self.path = nn.Parameter(torch.randn(1, 1, 1, WIDTH)), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        batch, rows = x.shape[0], x.shape[1] // SIDE
        y = self.change(F.layer_norm(x, (WIDTH,))).view(batch, rows, SIDE, rows, SIDE, WIDTH).transpose(2, 3)
        heads = self.qkv(y.reshape(-1, SIDE * SIDE, WIDTH)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        y = self.out(F.scaled_dot_product_attention(*heads.unbind(0)).transpose(1, 2).flatten(2))
        x = x + self.path(y.view(batch, rows, rows, SIDE, SIDE, WIDTH).transpose(2, 3).reshape(x.shape))
        gate, value = self.up(self.change(F.layer_norm(x, (WIDTH,)))).chunk(2, -1)
        y = F.dropout(F.silu(gate) * value, self.dropped, self.training)
        return x + self.gain * self.change(self.down(y))


class Net(nn.Module):
    def __init__(self, change: Callable[[Tensor], Tensor], dropped: float = 0.0) -> None:
        super().__init__()
        self.patches, self.block = nn.Conv2d(3, WIDTH, PATCH, PATCH), Block(change, dropped)

    def forward(self, image: Tensor) -> Tensor:
        return self.block(self.patches(image).permute(0, 2, 3, 1)).mean((1, 2))


def built(change: Callable[[Tensor], Tensor], dropped: float = 0.0) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(change, dropped).eval()


def image(count: int = 2) -> Tensor:
    """Alike within each cell."""
    cells = torch.randn(count, 3, len(CELLS), len(CELLS), generator=torch.Generator().manual_seed(0))
    return cells.repeat_interleave(CELLS * PATCH, 2).repeat_interleave(CELLS * PATCH, 3)


rested = partial(
    gtp_fx.optimize,
    schedule=[3],
    strategy=Regeneration(windows="rest", rest_share=1.0),
    example_inputs=image(),
    compile=False,
)

CHANGES = {
    "rolled": lambda x: torch.roll(x, 3, 3),
    "shifted": lambda x: F.pad(x, (1, -1)),
    "flipped": lambda x: x.flip(3),
    "without their log-sum-exp": lambda x: x - x.logsumexp(3, keepdim=True),
    "repeated": lambda x: x[..., : WIDTH // 2].repeat_interleave(2, 3),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
@torch.no_grad()
def test_features_change_as_in_the_model(change: Callable[[Tensor], Tensor]) -> None:
    model = built(change)
    fast = rested(model)
    assert [row.window_tokens for row in fast.report.sites] == [SIDE * SIDE]
    torch.testing.assert_close(fast(image(3)), model(image(3)), atol=1e-5, rtol=1e-4)
    without = model(image(3)) - built(lambda x: x)(image(3))
    assert without.abs().max() > 1e-2, "a change that does nothing proves nothing"


def test_features_picked_by_numbers_are_refused_by_name() -> None:
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(0))
    with pytest.raises(gtp_fx.UnsupportedModelError, match="not token-wise"):
        rested(built(lambda x: x[..., order]))


def test_what_lies_between_two_products_runs_once_for_all_rows() -> None:
    """Halves of features, gates, a gain of four dimensions: nothing is joined again for the last product."""
    gm = rested(built(lambda x: x)).graph_module
    count = lambda target: len(gm.graph.find_nodes(op="call_function", target=target))  # noqa: E731
    assert count(torch.ops.aten.silu.default) == 1 and count(torch.ops.aten.linear.default) == 4
    assert count(torch.ops.aten.cat.default) == 2, "the stream, and what attention returned"


@pytest.mark.parametrize("windows", ["rest", "skip"])
def test_dropout_in_training(windows: str) -> None:
    """It draws random numbers, for which the block as it was isn't kept beside the one that runs."""
    model = built(lambda x: x, dropped=0.5)
    fast = rested(model, strategy=Regeneration(windows=windows)).train()
    x = image(3)
    assert not torch.equal(fast(x), fast(x))
    fast(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


class Path(nn.Module):
    """Drops a branch of some images in training."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(0.5) if self.training else x


def test_counts_of_windows_are_not_taken_for_tokens_in_training() -> None:
    model = built(lambda x: x)
    model.block.path = Path()
    with pytest.raises(gtp_fx.GtpError, match=r"(?s)windows of block rest in the model's first mode.*can't rest"):
        rested(model).train()(image(3))
    assert rested(model, strategy=Regeneration(windows="skip")).train()(image(3)).shape == (3, WIDTH)
