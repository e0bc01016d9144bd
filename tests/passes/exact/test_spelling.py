"""Attention of windows and of merged heads, spelled as the one operator; and what only looks like it, left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.ops import aten

from gtp_fx.graph.symbols import shape_of
from gtp_fx.passes.exact.fuse_attention import fuse_attention
from gtp_fx.passes.exact.normalise import normalise

from support.graphs_by_hand import calls, node, patches, traced

WINDOWS, HEADS, TOKENS = 4, 3, 6


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


Q = noise(2 * WINDOWS, HEADS, TOKENS, 8)
BIAS = noise(1, HEADS, TOKENS, TOKENS)


def by_window(q: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """As shifted windows have it: a mask for each window, images and windows seen apart for as long as it is added."""
    logits = (q * 0.3) @ q.transpose(-2, -1) + bias
    masked = logits.view(-1, WINDOWS, HEADS, TOKENS, TOKENS) + mask
    return masked.view(-1, HEADS, TOKENS, TOKENS).softmax(-1) @ q


@pytest.mark.parametrize("heads", [1, HEADS])
def test_a_mask_for_each_window_becomes_a_bias(heads: int) -> None:
    inputs = (Q, BIAS, noise(1, WINDOWS, heads, TOKENS, TOKENS))
    gm = normalise(traced(by_window, *inputs))
    spelled = fuse_attention(gm)
    assert calls(spelled, aten.scaled_dot_product_attention.default) == 1
    assert not calls(spelled, aten.softmax.int)
    torch.testing.assert_close(spelled(*inputs), gm(*inputs))


def test_added_twice_it_counts_twice() -> None:
    """As one library does it."""
    inputs = (Q, BIAS, noise(1, WINDOWS, 1, TOKENS, TOKENS))
    gm = normalise(
        traced(lambda q, bias, mask: by_window(q, bias, mask + mask) + by_window(q, bias, mask) * 0, *inputs)
    )
    twice = normalise(traced(_twice, *inputs))
    assert calls(fuse_attention(twice), aten.scaled_dot_product_attention.default) == 1
    torch.testing.assert_close(fuse_attention(twice)(*inputs), gm(*inputs))


def _twice(q: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    logits = (q * 0.3) @ q.transpose(-2, -1) + bias
    masked = logits.view(-1, WINDOWS, HEADS, TOKENS, TOKENS) + mask + mask
    return masked.view(-1, HEADS, TOKENS, TOKENS).softmax(-1) @ q


@pytest.mark.parametrize(
    "shape", [(2, WINDOWS, 1, TOKENS, TOKENS), (1, 1, HEADS, 1, TOKENS), (1, WINDOWS, HEADS, TOKENS, 1)]
)
def test_so_does_one_for_each_image_or_key_or_query(shape: tuple[int, ...]) -> None:
    inputs = (Q, BIAS, noise(*shape))
    gm = normalise(traced(by_window, *inputs))
    assert calls(fuse_attention(gm), aten.scaled_dot_product_attention.default) == 1
    torch.testing.assert_close(fuse_attention(gm)(*inputs), gm(*inputs))


IMAGE, EMBED, QKV = noise(2, 3, 8, 6), noise(8, 3, 2, 2) * 0.3, noise(24, 8)


def merged(image: Tensor, embed: Tensor, qkv: Tensor, heads_first: bool = False) -> Tensor:
    """Fused attention on [images * heads, tokens, features], with a bias for each."""
    x = patches(image, embed)
    q, k, v = F.linear(x, qkv).reshape(2, -1, 3, 4, 2).permute(2, 0, 3, 1, 4).unbind(0)
    if heads_first:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    q, k, v = (t.reshape(8, -1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(q @ k.transpose(1, 2)).relu())


def test_heads_that_fused_attention_has_beside_images_get_their_dimension() -> None:
    gm = normalise(traced(lambda *inputs: merged(*inputs), IMAGE, EMBED, QKV))
    separate = fuse_attention(gm)
    attention = node(separate, aten.scaled_dot_product_attention.default)
    assert [shape_of(x) for x in node(gm, aten.scaled_dot_product_attention.default).args[:1]] == [(8, 12, 2)]
    assert attention.args[0].args[1] == [-1, 4, 12, 2]  # type: ignore[union-attr]
    torch.testing.assert_close(separate(IMAGE, EMBED, QKV), gm(IMAGE, EMBED, QKV))


def test_heads_before_images_stay_merged() -> None:
    gm = normalise(traced(lambda *inputs: merged(*inputs, heads_first=True), IMAGE, EMBED, QKV))
    separate = fuse_attention(gm)
    assert [str(n.target) for n in separate.graph.nodes] == [str(n.target) for n in gm.graph.nodes]


def test_what_is_added_up_twice_is_one_sum() -> None:
    """A list of all branches: each sum goes on from the last one. Other factors and orders are other sums."""

    def listed(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return torch.stack([torch.stack([x, y]).sum(0).tanh(), torch.stack([x, y, z]).sum(0), x.add(y, alpha=2)])

    inputs = [noise(2, 3, 4), noise(2, 4, 3).transpose(1, 2), noise(3, 2, 4).transpose(0, 1)]
    gm = traced(listed, *inputs)
    once = normalise(gm)
    assert calls(once, aten.add.Tensor) == 3
    torch.testing.assert_close(once(*inputs), gm(*inputs), rtol=0, atol=0)
