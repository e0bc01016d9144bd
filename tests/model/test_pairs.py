"""Pairs of pictures, as in stereo: one encoder for both, and a decoder whose tokens attend to the other picture's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gtp_fx
from bench.counted import flops
from gtp_fx.analysis.typed_graph import typed_graph

from support.batches import PATCH, SIDE, WIDTH, Block
from support.captured import exact, optimised, shared_model
from support.reference_stream import ALPHA, Stream
from support.video_nets import heads_of

GRID = SIDE // PATCH
STRATEGY = gtp_fx.GTP(alpha=ALPHA, token_scale=True, recovery="mean")
SCHEDULE = [15, 0, 12, 9]
"""Two blocks of the encoder, then the decoder's two."""


class Pair(nn.Module):
    """Two images [B, 3, SIDE, SIDE] each -> [B, N, 5] for the first one's patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.encoder, self.decoder = (nn.ModuleList(Block() for _ in range(2)) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)
        self.queries, self.keys = (nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2)) for _ in range(2))

    def places(self, positions: Tensor) -> Tensor:
        """What is added for positions [B, N, 2], from a table that is as long as the largest."""
        table = torch.arange(int(positions.max()) + 1)[:, None] * torch.linspace(0.1, 1, WIDTH)
        return F.embedding(positions[:, :, 0], table.cos()) + F.embedding(positions[:, :, 1], table.sin())

    def tokens(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """Both images' tokens [2B, N, C] and positions [2B, N, 2]."""
        x = self.patches(torch.cat([one, other]))
        row = torch.arange(GRID)
        positions = torch.cartesian_prod(row, row).view(1, -1, 2).expand(x.shape[0], -1, 2).clone()
        x = x.flatten(2).transpose(1, 2)
        return x + self.places(positions), positions

    def across(self, x: Tensor, other: Tensor, number: int) -> Tensor:
        keys = self.keys[number](other).unflatten(-1, (2, -1)).transpose(1, 2)
        queries = self.queries[number](x).unflatten(-1, (2, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(queries, keys, keys).transpose(1, 2).flatten(2)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        x, positions = self.tokens(one, other)
        for block in self.encoder:
            x = block(x)
        (x, y), (here, there) = self.norm(x).chunk(2), positions.chunk(2)
        x, y = x + self.places(here), y + self.places(there)
        for number, block in enumerate(self.decoder):
            x = x + block.out(F.scaled_dot_product_attention(*heads_of(block, x)).transpose(1, 2).flatten(2))
            x = x + self.across(x, y, number)
            x = x + block.mlp(block.norms[1](x))
        return self.head(x)

    def by_hand(self, one: Tensor, other: Tensor, schedule: Sequence[int]) -> Tensor:
        """Tokens leave the pictures of the encoder, are back for the decoder, and leave the first picture there."""
        x, positions = self.tokens(one, other)
        stream = Stream(x, (GRID, GRID), 0)
        for block, count in zip(self.encoder, schedule[:2], strict=True):
            stream.x_BNC = stream.x_BNC + block.out(stream.attend(*heads_of(block, stream.x_BNC)))
            stream.leave(count)
            stream.x_BNC = stream.x_BNC + block.mlp(block.norms[1](stream.x_BNC))
        x, y = stream.recovered(self.norm(stream.x_BNC)).chunk(2)
        x, y = x + self.places(positions[: len(one)]), y + self.places(positions[len(one) :])
        stream = Stream(x, (GRID, GRID), 0)
        for number, (block, count) in enumerate(zip(self.decoder, schedule[2:], strict=True)):
            stream.x_BNC = stream.x_BNC + block.out(stream.attend(*heads_of(block, stream.x_BNC)))
            stream.leave(count)
            stream.x_BNC = stream.x_BNC + self.across(stream.x_BNC, y, number)
            stream.x_BNC = stream.x_BNC + block.mlp(block.norms[1](stream.x_BNC))
        return stream.recovered(self.head(stream.x_BNC))


@dataclass(frozen=True)
class PairSource:
    """A source of that net, with the same weights as ever."""

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Pair().eval().requires_grad_(False)

    def inputs(self, batch: int = 2) -> tuple[Tensor, Tensor]:
        numbers = torch.Generator().manual_seed(batch)
        one, other = (torch.randn(batch, 3, SIDE, SIDE, generator=numbers) for _ in range(2))
        return one, other


@torch.no_grad()
def test_tokens_leave_both_pictures_and_then_the_one_that_looks_at_the_other() -> None:
    source = PairSource()
    net = shared_model(source)
    whole = optimised(source, flops_budget=1.0).graph_module
    fast = optimised(source, schedule=SCHEDULE, strategy=STRATEGY).graph_module
    for batch in (2, 3):
        pair = source.inputs(batch)
        torch.testing.assert_close(whole(*pair), net(*pair), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(fast(*pair), net.by_hand(*pair, SCHEDULE), atol=1e-5, rtol=1e-5)
    assert flops(fast, pair) < 0.9 * flops(net, pair)


def test_attention_to_another_picture_is_called_so() -> None:
    """It isn't over pooled keys of its own, though the other picture has as many tokens."""
    graph = exact(PairSource(), flops_budget=1.0).graph_module.graph
    told = [str(refusal) for refusal in typed_graph(graph).unsupported_attention]
    assert len(typed_graph(graph).blocks) == 4 and len(told) == 1
    assert "queries and keys run over different patch tokens" in told[0]
