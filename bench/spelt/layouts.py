"""The stream's layout within the blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.spelt.layers import ACTIVATIONS, RESIDUALS
from bench.spelt.sizes import CHANNELS, FEATURES, HEADS
from bench.spelt.streams import GATED, MANY

if TYPE_CHECKING:
    from bench.spelt.model import Block

# ---- the stream's layout within the blocks: there, and back, and the block where all of it works in that layout


def _tokens_first(block: Block, x: Tensor) -> Tensor:
    """[N, B, C], with the attention of nn.MultiheadAttention."""
    y = block.norm1(x)
    q_and_more = (CHANNELS, HEADS, block.qkv.weight, block.qkv.bias, None, None, False, 0.0)
    attended, _ = F.multi_head_attention_forward(
        y, y, y, *q_and_more, block.out.weight, block.out.bias, training=False, need_weights=False
    )
    x = RESIDUALS[block.spelling.residual](x, attended)
    y = block.down(ACTIVATIONS[block.spelling.activation](block.up(block.norm2(x))))
    return RESIDUALS[block.spelling.residual](x, y)


def _tokens_first_by_heads(block: Block, x: Tensor) -> Tensor:
    """[N, B, C], with attention over [N, B, H, D] by einsum."""
    count, batch, _ = x.shape
    q, k, v = block.qkv(block.norm1(x)).reshape(count, batch, 3, HEADS, FEATURES).unbind(2)
    weights = torch.einsum("ibhd,jbhd->bhij", q, k * FEATURES**-0.5).softmax(-1)
    attended = torch.einsum("bhij,jbhd->ibhd", weights, v).reshape(count, batch, CHANNELS)
    x = RESIDUALS[block.spelling.residual](x, block.out(attended))
    y = block.down(ACTIVATIONS[block.spelling.activation](block.up(block.norm2(x))))
    return RESIDUALS[block.spelling.residual](x, y)


def _tokens_last(block: Block, x: Tensor) -> Tensor:
    """[B, C, N], with convolutions for linear layers."""

    def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        scale = torch.rsqrt(centred.square().mean(1, keepdim=True) + 1e-5)
        return centred * scale * layer.weight[:, None] + layer.bias[:, None]

    def through(layer: nn.Linear, x: Tensor) -> Tensor:
        return F.conv1d(x, layer.weight[:, :, None], layer.bias)

    y = norm(block.norm1, x)
    weights, biases = block.qkv.weight.chunk(3), block.qkv.bias.chunk(3)
    each = [F.conv1d(y, weight[..., None], bias) for weight, bias in zip(weights, biases, strict=True)]
    q, k, v = (t.unflatten(1, (HEADS, FEATURES)) for t in each)
    attended = F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT
    x = RESIDUALS[block.spelling.residual](x, through(block.out, attended.flatten(1, 2)))
    y = through(block.down, ACTIVATIONS[block.spelling.activation](through(block.up, norm(block.norm2, x))))
    return RESIDUALS[block.spelling.residual](x, y)


Turn = Callable[[Tensor], Tensor]
LAYOUTS: Mapping[str, tuple[Turn, Turn, Callable[[Block, Tensor], Tensor] | None]] = {
    "[B, N, C]": (lambda x: x, lambda x: x, None),
    "[N, B, C]": (lambda x: x.transpose(0, 1), lambda x: x.transpose(0, 1), None),
    "[B, C, N]": (lambda x: x.mT, lambda x: x.mT, None),
    "[N, B, C], whole block": (lambda x: x.transpose(0, 1), lambda x: x.transpose(0, 1), _tokens_first),
    "[N, B, C], einsum": (lambda x: x.permute(1, 0, 2), lambda x: x.permute(1, 0, 2), _tokens_first_by_heads),
    "[B, C, N], whole block": (lambda x: x.mT, lambda x: x.mT, _tokens_last),
    **{name: (layout.begin, layout.end, layout.block) for name, layout in MANY.items()},
    **{name: (lambda x: x, lambda x: x, block) for name, block in GATED.items()},
}
