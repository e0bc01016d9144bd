"""Numbers that a forward reads from tensors which depend on no input are known while it is traced; no others are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gtp_fx.capture.inputs import call_signature
from gtp_fx.capture.module import capture_module
from gtp_fx.errors import CaptureError


class Positions:
    """A plain object that keeps positions [h * w, 2] by their grid."""

    def __init__(self) -> None:
        self.kept: dict[tuple[int, int], Tensor] = {}

    def __call__(self, batch: int, h: int, w: int) -> Tensor:
        if (h, w) not in self.kept:
            self.kept[h, w] = torch.cartesian_prod(torch.arange(h), torch.arange(w))
        return self.kept[h, w].view(1, h * w, 2).expand(batch, -1, 2).clone()


class Rotary(nn.Module):
    """Tokens [B, 12, 8] times cosines, looked up in a table as long as the largest position."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = Positions()
        self.tables: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        positions = self.positions(2 * x.shape[0], 3, 4)
        first = torch.zeros(2 * x.shape[0], 1, 2).to(positions.dtype)
        length = int(torch.cat([first, positions + 1], dim=1).max()) + 1
        if length not in self.tables:
            self.tables[length] = torch.arange(length)[:, None] * torch.arange(1, 9)
        return x * nn.functional.embedding(positions[: x.shape[0], :, 0], self.tables[length].float().cos())


@torch.no_grad()
def test_a_table_as_long_as_the_largest_position_is_captured() -> None:
    model = Rotary()
    captured = capture_module(model, call_signature(model, torch.randn(2, 12, 8)))
    assert not model.positions.kept and not model.tables  # nothing that was traced stays
    for batch in (2, 5):
        x = torch.randn(batch, 12, 8)
        torch.testing.assert_close(captured(x), model(x))


class Pairs(Rotary):
    """Tokens of two batches in one, parted again with their positions: the table is as long as one part's largest."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        both = torch.cat([x, y])
        parts = self.positions(both.shape[0], 3, 4).chunk(2)
        length = int((parts[1][:, :, 0] + 1).max())
        table = torch.arange(length + 1)[:, None] * torch.arange(1, 9)
        return both.chunk(2)[0] * nn.functional.embedding(parts[0][:, :, 1], table.float().cos())


@torch.no_grad()
def test_the_positions_of_two_batches_are_those_of_each() -> None:
    model = Pairs()
    captured = capture_module(model, call_signature(model, (torch.randn(2, 12, 8), torch.randn(2, 12, 8))))
    for batch in (2, 5):
        pair = torch.randn(batch, 12, 8), torch.randn(batch, 12, 8)
        torch.testing.assert_close(captured(*pair), model(*pair))


def _written(x: Tensor) -> int:
    numbers = torch.zeros(3, dtype=torch.long)
    numbers[1:] = 5
    return int(numbers.max())


READ: dict[str, Callable[[Tensor], int]] = {
    "an input": lambda x: int(x.max()),
    "the batch": lambda x: int(torch.arange(x.shape[0]).max()),
    "how many": lambda x: int(torch.ones(1, 3, dtype=torch.long).expand(x.shape[0], -1).sum()),
    "one of many": lambda x: int(torch.arange(6).view(6, 1).expand(6, x.shape[0]).flatten().chunk(2)[0].max()),
    "a part of each": lambda x: int(torch.arange(6).view(1, 6).expand(x.shape[0], 6).flatten()[:3].max()),
    "chance": lambda x: int(torch.randint(7, (3,)).max()),
    "written in place": _written,
}


class Reading(nn.Module):
    def __init__(self, read: Callable[[Tensor], int]) -> None:
        super().__init__()
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if self.read(x) > 2 else x


@pytest.mark.parametrize("read", READ)
def test_what_may_differ_is_not_known(read: str) -> None:
    model = Reading(READ[read])
    with pytest.raises(CaptureError, match="decides by what a tensor holds"):
        capture_module(model, call_signature(model, torch.randn(2, 12, 8)))
