"""Attention maps over all tokens: the original's where none is removed, and the remaining tokens' own afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gtp_fx

from support.small_models import NAME, noise
from support.zoo import enliven


def net(**options: Any) -> Any:
    return enliven(timm.create_model(NAME, depth=3, **options)).eval()


def attention_map(attention: Any, x_BNC: Tensor) -> Tensor:
    """Return timm's attention map, spelled out: [B, H, N, N]."""
    batch, count, _ = x_BNC.shape
    qkv = attention.qkv(x_BNC).reshape(batch, count, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    return F.softmax(qkv[0] @ qkv[1].transpose(-2, -1) * attention.scale, dim=-1)


@torch.no_grad()
def test_maps_are_the_originals_until_tokens_are_removed_and_those_of_the_remaining_ones_then() -> None:
    model, x = net(), noise()
    fast = gtp_fx.optimize(model, schedule=[8, 0, 0], compile=False, strategy=gtp_fx.GTP(alpha=0.0, token_scale=False))
    maps = fast.attention_maps(["blocks.0", "blocks.1.attn", "blocks.2"], x)
    assert list(maps) == ["blocks.0", "blocks.1.attn", "blocks.2"]

    stream = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    torch.testing.assert_close(maps["blocks.0"], attention_map(model.blocks[0].attn, model.blocks[0].norm1(stream)))
    # Nothing is passed on, so the remaining tokens are the first block's own.
    (kept,) = fast.provenance(x)
    place = torch.cat([torch.zeros(len(x), 1, dtype=torch.int64), kept.index + 1], dim=1)
    stream = model.blocks[0](stream)
    remaining = stream.gather(1, place[..., None].expand(-1, -1, stream.shape[-1]))
    wanted = attention_map(model.blocks[1].attn, model.blocks[1].norm1(remaining))
    found, whole = maps["blocks.1.attn"], stream.shape[1]
    assert found.shape == (*wanted.shape[:2], whole, whole)
    for image in range(len(x)):
        at = place[image]
        torch.testing.assert_close(found[image][:, at][:, :, at], wanted[image], rtol=1e-4, atol=1e-5)
        removed = [token for token in range(whole) if token not in at.tolist()]
        assert len(removed) == 8
        assert not bool(found[image][:, removed].any()) and not bool(found[image][:, :, removed].any())
    # In the last block, only the class token attends.
    torch.testing.assert_close(maps["blocks.2"].sum(-1)[:, :, 0], torch.ones(len(x), maps["blocks.2"].shape[1]))
    assert not bool(maps["blocks.2"][:, :, 1:].any())


@pytest.mark.nightly
@torch.no_grad()
def test_biases_count_and_several_sites_add_up() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit, self.bias = net(), nn.Parameter(torch.randn(1, 2, 101, 101))
            for block in self.vit.blocks:
                block.attn.fused_attn = False

        def forward(self, x: Tensor) -> Tensor:
            vit: Any = self.vit
            x = vit._pos_embed(vit.patch_embed(x))
            for block in vit.blocks:
                y = block.norm1(x)
                q, k, v = block.attn.qkv(y).reshape(len(x), -1, 3, 2, 32).permute(2, 0, 3, 1, 4)
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
                x = x + block.attn.proj(y.transpose(1, 2).flatten(2))
                x = x + block.mlp(block.norm2(x))
            return vit.head(x.mean(dim=1))  # type: ignore[no-any-return]

    model, x = Biased(), noise()
    fast = gtp_fx.optimize(model, schedule=[8, 8, 0], compile=False, example_inputs=x)
    first, last = fast.attention_maps([0, 2], x).values()  # no module is called around attention
    y = model.vit.blocks[0].norm1(model.vit._pos_embed(model.vit.patch_embed(x)))
    q, k, _ = model.vit.blocks[0].attn.qkv(y).reshape(len(x), -1, 3, 2, 32).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(first, F.softmax(q @ k.transpose(-2, -1) / 32**0.5 + model.bias, dim=-1))
    (kept,) = fast.provenance(x)
    for image, index in enumerate(kept.index + 1):
        attended = last[image].sum(dim=(0, 1)).nonzero().flatten().tolist()
        assert attended == [0, *index.tolist()]


def test_a_path_without_one_block_is_refused() -> None:
    fast = gtp_fx.optimize(net(), schedule=[8, 0, 0], compile=False)
    for layer in ("blocks", "norm", "blocks.9", 3):
        with pytest.raises(gtp_fx.InputError, match=rf"{layer!r} is no path of one attention block.*'blocks.\d.attn'"):
            fast.attention_maps([layer], noise())
