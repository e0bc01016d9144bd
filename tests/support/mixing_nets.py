"""Small vision transformers whose residuals are no sums with a fixed share of the stream, and the same walked by hand.

Letters in tensor names: B images, N tokens, S streams beside each other, C channels. T is S * C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.batches import PATCH, WIDTH, Block
from support.reference_stream import Stream
from support.video_nets import heads_of

GRID = 6
STREAMS = 3
RESIDUALS = (
    "orthogonal",
    "gated",
    "squashed",
    "recurrent unit",
    "static mixing",
    "mixing by token",
    "mixing, streams in the batch",
    "mixing, streams first",
)


class Mixing(nn.Module):
    """Patches and a CLS, three blocks, and a head that reads the mean of their tokens."""

    def __init__(self, residual: str) -> None:
        super().__init__()
        self.residual = residual
        self.several = STREAMS if "mixing" in residual else 0
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.gates = nn.ModuleList(nn.Linear(WIDTH, 1) for _ in range(6))
        self.mix = nn.ParameterList(torch.randn(STREAMS, 1 + STREAMS) / 2 for _ in range(6))
        self.weigh = nn.ParameterList(torch.randn(WIDTH, 1 + STREAMS) / 3 for _ in range(6))
        self.spread = nn.ParameterList(torch.randn(WIDTH) / 3 for _ in range(6))
        self.beta = nn.Parameter(torch.linspace(0.5, 1, STREAMS))
        self.head = nn.Linear(WIDTH, 5)
        self.cells = nn.ModuleList(nn.GRUCell(WIDTH, WIDTH) for _ in range(6))

    def tokens(self, image: Tensor) -> Tensor:
        """[B, N, C], or [B, N, S, C] where there are several streams."""
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)
        return self.laid(x[:, :, None].expand(-1, -1, STREAMS, -1)) if self.several else x

    def laid(self, x: Tensor) -> Tensor:
        """Streams [B, N, S, C] in the layout that they are kept in."""
        if self.residual == "mixing, streams first":
            return x.permute(2, 0, 1, 3)
        return x.transpose(1, 2).flatten(0, 1) if self.residual == "mixing, streams in the batch" else x

    def rows(self, x: Tensor) -> Tensor:
        """The same back: [B, N, S, C]; one stream stays as it is."""
        if self.residual == "mixing, streams first":
            return x.permute(1, 2, 0, 3)
        return x.unflatten(0, (-1, STREAMS)).transpose(1, 2) if self.residual == "mixing, streams in the batch" else x

    def before(self, x: Tensor, place: int) -> tuple[Tensor, Tensor, Tensor]:
        """What a branch reads, what of the state goes past it, and where in the state its result goes."""
        if not self.several:
            return x, x, x
        weights, spread = self.mix[place], self.beta
        if self.residual == "mixing by token":
            normed = F.layer_norm(x, (WIDTH,))
            weights = weights + 0.1 * (normed @ self.weigh[place]).tanh()
            spread = spread + 0.1 * (normed @ self.spread[place]).tanh()
        mixed = torch.einsum("...st,...sc->...tc", weights, self.rows(x))
        return mixed[..., 0, :], mixed[..., 1:, :], spread

    def after(self, past: Tensor, spread: Tensor, y: Tensor, place: int) -> Tensor:
        """The next state, of what went past a branch and its result [B, N, C]."""
        if self.several:
            return self.laid(spread[..., None] * y[:, :, None]) + self.laid(past)
        if self.residual == "recurrent unit":
            return self.cells[place](y.flatten(0, 1), past.flatten(0, 1)).view(past.shape)
        if self.residual == "orthogonal":
            unit = F.normalize(past, dim=-1)
            return past + 0 + (y - (y * unit).sum(-1, keepdim=True) * unit)
        gate = self.gates[place](past).sigmoid()
        return past * gate + y if self.residual == "gated" else gate * past + (1 - gate) * y

    def forward(self, image: Tensor) -> Tensor:
        x = self.tokens(image)
        for number, block in enumerate(self.blocks):
            read, past, spread = self.before(x, 2 * number)
            y = block.out(F.scaled_dot_product_attention(*heads_of(block, read)).transpose(1, 2).flatten(2))
            x = self.then(self.after(past, spread, y, 2 * number))
            read, past, spread = self.before(x, 2 * number + 1)
            x = self.then(self.after(past, spread, block.mlp(block.norms[1](read)), 2 * number + 1))
        return self.read(x)

    def then(self, x: Tensor) -> Tensor:
        """What is done with a state before anything reads it."""
        return torch.tanh(x) if self.residual == "squashed" else x

    def read(self, x: Tensor) -> Tensor:
        return self.head((self.rows(x).sum(2) if self.several else x).mean(1))

    def by_hand(self, image: Tensor, schedule: Sequence[int]) -> Tensor:
        """What remains where tokens leave after the first join behind each attention, with all of their state."""
        stream = Stream(self.rows(self.tokens(image)).flatten(2), (GRID, GRID), 1)

        def state() -> Tensor:
            return self.laid(stream.x_BNC.unflatten(2, (STREAMS, WIDTH))) if self.several else stream.x_BNC

        for number, (block, count) in enumerate(zip(self.blocks, schedule, strict=True)):
            read, past, spread = self.before(state(), 2 * number)
            y = block.out(stream.attend(*heads_of(block, read)))
            stream.x_BNC = self.rows(self.after(past, spread, y, 2 * number)).flatten(2)
            stream.leave(count)
            stream.x_BNC = self.then(stream.x_BNC)
            read, past, spread = self.before(state(), 2 * number + 1)
            y = block.mlp(block.norms[1](read))
            stream.x_BNC = self.then(self.rows(self.after(past, spread, y, 2 * number + 1)).flatten(2))
        return self.read(state())


@dataclass(frozen=True)
class Residual:
    """A source of one of these nets, with the same weights as ever."""

    kind: str

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Mixing(self.kind).eval().requires_grad_(False)

    def inputs(self, batch: int = 2) -> Tensor:
        return torch.randn(batch, 3, GRID * PATCH, GRID * PATCH, generator=torch.Generator().manual_seed(batch))
