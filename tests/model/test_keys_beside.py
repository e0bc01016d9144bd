"""Keys that are no tokens, beside those of the tokens: learned ones, zeros, memory, what is joined for keys alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gtp_fx
from bench.counted import flops
from bench.live_weights import enliven

from support.plain_vit import WIDTH, Block, PlainViT, built, images

HEADS, MEMORY = 4, 3


class Memory(Block):
    """Learned keys and values before those of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = (nn.Parameter(torch.randn(HEADS, MEMORY, WIDTH // HEADS)) for _ in range(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (x.expand(q.shape[0], -1, -1, -1) for x in (self.keys, self.values))
        return F.scaled_dot_product_attention(q, torch.cat([keys, k], 2), torch.cat([values, v], 2))


class MemoryAndBias(Memory):
    """After the tokens', spelled out, and with a bias that all keys have."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(HEADS, 37, 37 + MEMORY))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (x.expand(q.shape[0], -1, -1, -1) for x in (self.keys, self.values))
        logits = q @ torch.cat([k, keys], 2).mT * q.shape[-1] ** -0.5 + self.bias
        return logits.softmax(-1) @ torch.cat([v, values], 2)


class Torch(Block):
    """torch's own layer with a learned key and a zero one."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True, add_zero_attn=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class FromImage(Block):
    """One more key and value, made of the image's CLS token."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, *kv = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(y).chunk(3, -1))
        k, v = (torch.cat([t[:, :, :1] * 0.5, t], 2) for t in kv)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def alive(block: type[Block]) -> Any:
    return enliven(built(lambda: PlainViT(block))).requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize(
    ("block", "strategy"),
    [
        pytest.param(Torch, "gtp", marks=pytest.mark.nightly),
        pytest.param(Memory, "tome", marks=pytest.mark.nightly),  # reads the tokens' keys
        pytest.param(MemoryAndBias, "topk", marks=pytest.mark.nightly),  # reads CLS's row of the map
        pytest.param(FromImage, "gtp", marks=pytest.mark.nightly),
    ],
)
def test_exact_at_one_and_within_the_budget_for_another_batch(block: type[Block], strategy: str) -> None:
    model, x = alive(block), images(3)
    exact = gtp_fx.optimize(model, flops_budget=1.0, example_inputs=images(), compile=False)
    torch.testing.assert_close(exact(x), model(x), rtol=1e-4, atol=1e-5)
    fast = gtp_fx.optimize(model, flops_budget=0.7, strategy=strategy, example_inputs=images(), compile=False)
    assert flops(fast, (x,)) <= 0.7 * flops(model, (x,))
    torch.testing.assert_close(fast(x[1:2]), fast(x)[1:2], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("block", [Memory, pytest.param(MemoryAndBias, marks=pytest.mark.nightly)])
def test_tokens_are_ranked_by_what_tokens_give_them(block: type[Block]) -> None:
    """The method by hand: scores are of the tokens' columns of the map, memory stays, and nothing is passed on."""
    model, x = alive(block), images()
    strategy = gtp_fx.GTP(alpha=0.0, token_scale=False)
    fast = gtp_fx.optimize(model, schedule=[12, 0, 0], strategy=strategy, example_inputs=x, compile=False)
    first, *later = model.blocks
    tokens = model.tokens(x)
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in first.qkv(first.norm1(tokens)).chunk(3, -1))
    count = k.shape[2]
    marks = torch.eye(count).expand(2, HEADS, count, count)  # as values they show the map's columns of the tokens
    weights = without_values(first, count).attend(q, k, marks)
    score = weights.diagonal(dim1=2, dim2=3).amax(1) * weights.sum(2).amax(1)
    kept = score[:, 1:].topk(24).indices.sort(1).values
    rows = torch.cat([torch.zeros(2, 1, dtype=torch.int64), 1 + kept], 1)
    stream = tokens + first.out(first.attend(q, k, v).transpose(1, 2).flatten(2))
    stream = stream.gather(1, rows[..., None].expand(-1, -1, WIDTH))
    stream = stream + first.mlp(first.norm2(stream))
    results = []
    for image in range(2):  # a bias by position is taken for the tokens that are left
        here = stream[image : image + 1]
        for each in later:
            here = with_rows(each, rows[image])(here)
        results.append(model.head(model.norm(here))[:, 0])
    torch.testing.assert_close(fast(x), torch.cat(results), rtol=1e-4, atol=1e-5)


def without_values(block: Any, count: int) -> Any:
    """The block's memory with values of zero, one number for each of `count` tokens."""
    bare = type(block)()
    bare.load_state_dict(block.state_dict())
    bare.values = nn.Parameter(torch.zeros(HEADS, MEMORY, count), requires_grad=False)
    return bare


def with_rows(block: Any, rows: Tensor) -> Any:
    """The block over some tokens: where it has a bias by position, with that of theirs and of the memory."""
    if not isinstance(block, MemoryAndBias):
        return block
    fewer = MemoryAndBias()
    fewer.load_state_dict(block.state_dict())
    columns = torch.cat([rows, torch.arange(37, 37 + MEMORY)])
    fewer.bias = nn.Parameter(block.bias[:, rows][:, :, columns], requires_grad=False)
    return fewer
